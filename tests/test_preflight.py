"""Hostile pickles of every kind in a torch_dist checkpoint: refused, by name, and nothing of them is executed.

Each bomb would create a file; the file must not exist afterwards. A last test detonates one on purpose, in the stock
way, so that the others are known to be able to fail.
"""

import io
import json
import os
import pickle
import shutil
import stat
import zipfile
from pathlib import Path

import pool_checkpoint
import pytest
import torch
from checkpoint_family import MODEL, random_weights
from worker_pool import WorkerPool

from nemo_elastic.checkpoint.reader import MemoryReader, lazy_tensors
from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.mcore import versions
from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
from nemo_elastic.mcore.checkpoint.dist_save import write_torch_dist
from nemo_elastic.mcore.checkpoint.held_checkpoint import HeldCheckpoint, refuse_hostile
from nemo_elastic.mcore.checkpoint.preflight import parse_metadata, read_metadata
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.layout import ParamLayout

KEY = "module.decoder.layers.0.mixer.in_proj._extra_state/shard_0_1"


class Bomb:
    """Creates a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (open, (str(self.marker), "w"))


@pytest.fixture(scope="module")
def benign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours, to be spoilt in copies."""
    folder = tmp_path_factory.mktemp("benign") / "weights"
    write_torch_dist(folder, lazy_tensors(MemoryReader(random_weights())), ParamLayout(architecture_of(MODEL)))
    return folder


@pytest.fixture
def weights(benign: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(benign, tmp_path / "weights"))


def edit_metadata(weights: Path, edit: object) -> None:
    """Change `.metadata` the way an attacker would: load it, edit it, pickle it."""
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    edit(metadata)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def saved(value: object) -> bytes:
    """torch.save to bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def point_to_new_record(weights: Path, key: str, data: bytes, file: str = "__0_0.distcp") -> None:
    """Append `data` to the shard and let `key` lie there."""
    shard = weights / file
    start = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(data)

    def edit(metadata: object) -> None:
        info = next(i for k, i in metadata.storage_data.items() if k.fqn == key)
        info.offset, info.length = start, len(data)

    edit_metadata(weights, edit)


def test_plain_checkpoint_passes(weights: Path) -> None:
    metadata = refuse_hostile(weights)
    assert KEY in metadata.objects
    assert metadata.tensors["module.decoder.final_norm.weight"].shape == (48,)


@pytest.mark.parametrize("place", ["planner_data", "mcore_data", "state_dict_metadata"])
def test_hostile_metadata_is_refused(weights: Path, tmp_path: Path, place: str) -> None:
    def edit(metadata: object) -> None:
        setattr(metadata, place, {**(getattr(metadata, place, None) or {}), "x": Bomb(tmp_path / "boom")})

    edit_metadata(weights, edit)
    for read in (TorchDistReader, refuse_hostile):
        with pytest.raises(ProblemsError, match=r"refused global (_io|io|builtins)\.open.*nothing of it was executed"):
            read(weights)
    assert not (tmp_path / "boom").exists()


def test_allowed_names_are_inert(tmp_path: Path) -> None:
    """Even a listed name is only recorded: `getattr` chains and methods behind it cannot be reached."""

    class Reach:
        def __reduce__(self) -> tuple:
            return (getattr, (torch.Size, "numel"))

    with pytest.raises(ProblemsError, match=r"refused global builtins\.getattr"):
        parse_metadata(pickle.dumps(Reach()), tmp_path / ".metadata")


def test_hostile_common_is_refused(weights: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": Bomb(tmp_path / "boom")}, weights / "common.pt")
    with pytest.raises(ProblemsError, match=r"common\.pt: holds a pickle that is not plain data"):
        refuse_hostile(weights)
    assert not (tmp_path / "boom").exists()


def test_hostile_byte_object_is_refused_and_never_read(weights: Path, tmp_path: Path) -> None:
    point_to_new_record(weights, KEY, saved([Bomb(tmp_path / "boom")]))
    with pytest.raises(ProblemsError, match="holds a pickle that is not plain data"):
        refuse_hostile(weights)
    reader = TorchDistReader(weights)
    for name in reader.names():
        reader.read(name)
    assert not (tmp_path / "boom").exists()


def test_hostile_tensor_record_is_refused(weights: Path, tmp_path: Path) -> None:
    point_to_new_record(weights, "module.decoder.final_norm.weight", saved(Bomb(tmp_path / "boom")))
    with pytest.raises(ProblemsError, match=r"final_norm.weight"):
        TorchDistReader(weights).read("decoder.final_norm.weight")
    assert not (tmp_path / "boom").exists()


def test_tensor_record_of_another_kind_is_refused(weights: Path) -> None:
    point_to_new_record(weights, "module.decoder.final_norm.weight", saved({"a": 1}))
    with pytest.raises(ProblemsError, match="is damaged"):
        TorchDistReader(weights).read("decoder.final_norm.weight")


def test_zip_bomb_record_is_refused(weights: Path) -> None:
    """A record whose storage is compressed (torch never does) is not inflated."""
    plain = zipfile.ZipFile(io.BytesIO(saved(torch.ones(48))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for info in plain.infolist():
            packed.writestr(info.filename, plain.read(info))
    point_to_new_record(weights, "module.decoder.final_norm.weight", buffer.getvalue())
    with pytest.raises(ProblemsError, match="compressed"):
        TorchDistReader(weights).read("decoder.final_norm.weight")


@pytest.mark.parametrize("target", ["../outside.distcp", "/etc/passwd", "sub/file", "..", ""])
def test_paths_that_leave_the_folder_are_refused(weights: Path, target: str) -> None:
    def edit(metadata: object) -> None:
        next(iter(metadata.storage_data.values())).relative_path = target

    edit_metadata(weights, edit)
    with pytest.raises(ProblemsError, match="outside the folder"):
        TorchDistReader(weights)


def test_what_is_exchanged_after_the_check_is_not_read(weights: Path, tmp_path: Path, one_rank: None) -> None:
    """Every file of the folder is replaced by a hostile one between check and load."""
    from megatron.core import dist_checkpointing

    key = "module.decoder.final_norm.weight"
    expected = random_weights()["decoder.final_norm.weight"]
    with TorchDistReader(weights) as reader, HeldCheckpoint(weights) as checked:
        for path in list(weights.iterdir()):
            (tmp_path / "other").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
            (tmp_path / "other").rename(path)
        assert torch.equal(reader.read("decoder.final_norm.weight"), expected)
        state = {key: sharded(key, torch.empty(48))}
        found = dist_checkpointing.load(state, str(checked / "weights"))
        assert torch.equal(found[key], expected)
        assert stat.S_IMODE(checked.stat().st_mode) == 0o700
    assert not checked.exists() and not (tmp_path / "boom").exists()
    with pytest.raises(ProblemsError):  # what lies there now
        HeldCheckpoint(weights)
    assert not (tmp_path / "boom").exists()


def sharded(key: str, tensor: torch.Tensor) -> object:
    """A tensor that a stock load fills."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return ShardedTensor.from_rank_offsets(key, tensor)


def test_small_files_that_are_rewritten_in_place_are_not_read(weights: Path, tmp_path: Path, one_rank: None) -> None:
    from megatron.core import dist_checkpointing

    key, bomb = "module.decoder.final_norm.weight", pickle.dumps(Bomb(tmp_path / "boom"))
    with HeldCheckpoint(weights) as checked:
        for name in (".metadata", "common.pt", "metadata.json"):
            with (weights / name).open("r+b") as file:
                file.write(bomb)
        dist_checkpointing.load({key: sharded(key, torch.empty(48))}, str(checked / "weights"))
    assert not (tmp_path / "boom").exists()


def test_only_what_was_checked_is_handed_on(weights: Path, tmp_path: Path) -> None:
    """Files that other loaders of the stock chain would unpickle if they were there."""
    (weights / "modelopt_state").mkdir()
    (weights / "modelopt_state" / "common.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    (weights / "module.x.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with HeldCheckpoint(weights.parent) as checked:
        names = {p.relative_to(checked).as_posix() for p in checked.rglob("*")}
        files = (".metadata", "common.pt", "metadata.json", "__0_0.distcp")
        assert names == {"weights", *(f"weights/{name}" for name in files)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"sharded_backend": "zarr", "sharded_backend_version": 1}', "only torch_dist is read"),
        ('{"sharded_backend": "torch_dist", "common_backend": "mine"}', "only torch_dist is read"),
        ("[]", "is damaged"),
        (None, "is missing"),
    ],
)
def test_other_loaders_cannot_be_chosen(weights: Path, text: str | None, words: str) -> None:
    (weights / "metadata.json").unlink()
    if text is not None:
        (weights / "metadata.json").write_text(text)
    with pytest.raises(ProblemsError, match=rf"metadata\.json: .*{words}"):
        HeldCheckpoint(weights)


def test_what_is_no_file_is_refused(weights: Path) -> None:
    (weights / "__0_0.distcp").unlink()
    os.mkfifo(weights / "__0_0.distcp")  # opening it would block for ever
    for read in (TorchDistReader, refuse_hostile):
        with pytest.raises(ProblemsError, match=r"__0_0\.distcp: is missing"):
            read(weights)


ONLY_OLD = pytest.mark.skipif(versions.installed() != versions.TESTED[0], reason="0.16 refuses to write it")


@pytest.mark.parametrize("kind", [pytest.param("fully_sharded_model_space", marks=ONLY_OLD), "fully_reshardable"])
def test_distributed_optimizer_passes_and_is_loaded_from_what_was_checked(
    pool2: WorkerPool, tmp_path: Path, kind: str
) -> None:
    for saved_sum, loaded_sum, objects in pool2.run(pool_checkpoint.optimizer_round_trip, str(tmp_path / "w"), kind):
        assert saved_sum == loaded_sum and objects > 0
    metadata = read_metadata(tmp_path / "w")
    assert any(key.startswith("optimizer.") for key in (*metadata.tensors, *metadata.objects))
    if metadata.objects:
        key = next(k for k in metadata.objects)
        point_to_new_record(tmp_path / "w", key, saved([Bomb(tmp_path / "boom")]), f"{metadata.objects[key].file}")
        with pytest.raises(ProblemsError, match="holds a pickle that is not plain data"):
            refuse_hostile(tmp_path / "w")
    assert not (tmp_path / "boom").exists()


def test_hostile_tokenizer_is_copied_as_data(tmp_path: Path) -> None:
    """A tokenizer folder that brings code, a pickle and a class of its own: only plain data is copied."""
    from checkpoint_family import TOKENIZER

    from nemo_elastic.checkpoint.tokenizer_files import write_tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    bomb = f"open({str(tmp_path / 'boom')!r}, 'w')\n"
    (folder / "tokenization_mine.py").write_text(bomb)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    said = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "eos_token": "<|endoftext|>"}))
    write_tokenizer(tmp_path / "out", folder)
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"tokenizer.json", "tokenizer_config.json"}
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "auto_map" not in config and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == "<|endoftext|>" and not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors"])
def test_hf_folder_with_a_pickle_is_refused(tmp_path: Path, name: str) -> None:
    """Weights as a pickle, by its own name or under that of safetensors."""
    from checkpoint_family import write_hf_parent

    from nemo_elastic.checkpoint.huggingface import HuggingFaceReader

    folder = write_hf_parent(tmp_path / "hf", random_weights())
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(saved(Bomb(tmp_path / "boom")))
    (folder / "configuration_mine.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "configuration_mine.Mine"}}))
    with pytest.raises(ProblemsError, match=r"has neither|truncated or no safetensors"):
        HuggingFaceReader(folder)
    assert not (tmp_path / "boom").exists()


def test_garbage_metadata_is_an_error_of_the_user(weights: Path) -> None:
    (weights / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(ProblemsError, match="is damaged"):
        TorchDistReader(weights)


def test_chunks_outside_their_tensor_are_refused(weights: Path) -> None:
    def edit(metadata: object) -> None:
        item = metadata.state_dict_metadata["module.decoder.final_norm.weight"]
        item.chunks[0].sizes = torch.Size([49])

    edit_metadata(weights, edit)
    with pytest.raises(ProblemsError, match="outside its shape"):
        read_metadata(weights)


def test_hostile_context_is_read_as_data(weights: Path, tmp_path: Path) -> None:
    """`io.json` and `model.yaml` name things to call; only numbers are taken from them."""
    from nemo_elastic.config.parent_nemo import read_nemo_context
    from nemo_elastic.config.stored_rows import embedding_rows

    context = weights.parent / "context"
    context.mkdir()
    (context / "model.yaml").write_text(f"!!python/object/apply:os.mknod ['{tmp_path / 'boom'}']\n")
    with pytest.raises(ProblemsError, match="cannot be read"):
        read_nemo_context(weights.parent)
    (context / "model.yaml").write_text(
        f"_target_: os.mknod\nconfig:\n  _target_: os.mknod\n  path: {tmp_path / 'boom'}\n  hidden_size: 48\n"
        "  hybrid_override_pattern: M-\n"
    )
    model = read_nemo_context(weights.parent).model
    rows = TorchDistReader(weights).shape("embedding.word_embeddings.weight")[0]
    assert model == {"hybrid_override_pattern": "M-", "hidden_size": 48, "vocab_size": rows}
    with (context / "model.yaml").open("a") as file:
        file.write("  activation_func: {_target_: os.system, _call_: true}\n")
    with pytest.raises(ProblemsError, match=r"activation_func: os\.system is not supported"):
        read_nemo_context(weights.parent)
    edit_metadata(weights, lambda m: setattr(m, "planner_data", Bomb(tmp_path / "boom")))
    assert embedding_rows(weights.parent) == rows  # without calling what it names
    assert not (tmp_path / "boom").exists()


def test_the_bombs_work(weights: Path, tmp_path: Path) -> None:
    """The same bomb under a plain `pickle.load`, as a stock loader does it."""
    edit_metadata(weights, lambda m: setattr(m, "planner_data", Bomb(tmp_path / "boom")))
    pickle.loads((weights / ".metadata").read_bytes())
    assert (tmp_path / "boom").exists()
