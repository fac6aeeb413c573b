# Chosen for its stack: NeMo Framework 26.02 is the last release with NeMo 2 (2.7) and is on Megatron-core 0.16, the line
# that constraints.txt pins; 25.11 (NeMo 2.6) is on 0.15, which works too, and from 26.04 on there is no NeMo 2
# (docs/engine.md). NeMo 2.6 and 2.7 are alike in what is used here. Not built on the machine this was written on.
ARG NEMO_IMAGE=nvcr.io/nvidia/nemo:26.02
FROM ${NEMO_IMAGE}

# The image's interpreter may lie where only root may go.
COPY scripts/open_python.py /tmp/open_python.py
RUN python3 /tmp/open_python.py

ARG USER_ID=10001
RUN useradd --create-home --uid ${USER_ID} elastic \
    && install --directory --owner=elastic --group=elastic /opt/nemo_elastic
WORKDIR /opt/nemo_elastic
USER ${USER_ID}

# The set-up first, so that a change of the code does not repeat it. It finds the image's torch, Megatron-core and
# NeMo, and makes a venv on top of them.
COPY --chown=elastic:elastic Makefile pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY --chown=elastic:elastic scripts ./scripts
COPY --chown=elastic:elastic nemo_elastic/__init__.py ./nemo_elastic/__init__.py
RUN make setup

COPY --chown=elastic:elastic . .
ENV PATH=/opt/nemo_elastic/.venv/bin:${PATH}

HEALTHCHECK --interval=60s --timeout=20s --retries=3 \
    CMD ["sh", "-c", "nemo-elastic plan --config conf/tiny_parent.yaml > /dev/null || exit 1"]

CMD ["nemo-elastic", "--help"]
