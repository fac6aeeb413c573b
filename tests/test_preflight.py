"""Hostile pickles of every kind in a torch_dist checkpoint: refused, by name, and nothing of them is executed.

Each bomb would create a file; the file must not exist afterwards. A last test detonates one on purpose, in the stock
way, so that the others are known to be able to fail.
"""

import io
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_family import MODEL, random_weights

from nemo_elastic.checkpoint.reader import MemoryReader, lazy_tensors
from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.layout import ParamLayout
from nemo_elastic.mcore.dist_checkpoint import TorchDistReader
from nemo_elastic.mcore.dist_save import write_torch_dist
from nemo_elastic.mcore.preflight import parse_metadata, read_metadata, refuse_hostile
from nemo_elastic.problems import ProblemsError

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


def point_to_new_record(weights: Path, key: str, data: bytes) -> None:
    """Append `data` to the shard and let `key` lie there."""
    shard = weights / "__0_0.distcp"
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
        setattr(metadata, place, {**(getattr(metadata, place) or {}), "x": Bomb(tmp_path / "boom")})

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
    from nemo_elastic.checkpoint.nemo_context import read_nemo_context

    context = weights.parent / "context"
    context.mkdir()
    (context / "model.yaml").write_text(f"!!python/object/apply:os.mknod ['{tmp_path / 'boom'}']\n")
    with pytest.raises(ProblemsError, match="cannot be read"):
        read_nemo_context(weights.parent, 2048)
    (context / "model.yaml").write_text(
        f"_target_: os.mknod\nconfig:\n  _target_: os.mknod\n  path: {tmp_path / 'boom'}\n  hidden_size: 48\n"
        "  hybrid_override_pattern: M-\n  activation_func: {_target_: os.system, _call_: true}\n"
    )
    model = read_nemo_context(weights.parent, 2048).model
    assert model == {"hybrid_override_pattern": "M-", "hidden_size": 48, "vocab_size": 2048}
    assert not (tmp_path / "boom").exists()


def test_the_bombs_work(weights: Path, tmp_path: Path) -> None:
    """The same bomb under a plain `pickle.load`, as a stock loader does it."""
    edit_metadata(weights, lambda m: setattr(m, "planner_data", Bomb(tmp_path / "boom")))
    pickle.loads((weights / ".metadata").read_bytes())
    assert (tmp_path / "boom").exists()
