# The lab as an image: `make image`, or plain `docker build -t memlib .`; docs/image.md says more.
# Nothing here needs BuildKit: docker, podman, buildah and Binder build it alike.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# What the build needs (wheels, pip's settings) stays in the stages before the last.
FROM ${BASE_IMAGE} AS packages
# 1: take the wheels from environment/wheelhouse (`make wheelhouse`), not from the network.
ARG PIP_NO_INDEX
ENV PIP_FIND_LINKS=/build PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
# The brackets make the wheelhouse optional: a pattern may match nothing.
COPY environment/base.txt environment/wheelhous[e] ./
RUN python -m venv --prompt memlib /opt/venv \
    && /opt/venv/bin/pip install --no-compile --no-deps --require-hashes -r base.txt \
    && /opt/venv/bin/python -m compileall -qq -j 0 -x '/tests?/' /opt/venv/lib \
    && chmod -R g=u /opt/venv

# Apart from the other packages: a layer of its own, and the larger one.
FROM packages AS torch
ARG TORCH=cpu
COPY environment/torch-${TORCH}.txt ./
# torch's own tests and Triton's static libraries (200 MB) are of no use at run time. What does not
# compile is written for a later Python.
RUN /opt/venv/bin/pip install --no-compile --no-deps --require-hashes \
        --prefix /opt/torch -r torch-${TORCH}.txt \
    && rm -rf /opt/torch/lib/python3.11/site-packages/torch/test \
        /opt/torch/lib/python3.11/site-packages/torch/bin/test_* \
    && find /opt/torch -name '*.a' -delete \
    && /opt/venv/bin/python -m compileall -qq -j 0 -x '/tests?/|/testing/_internal/' /opt/torch/lib \
    && chmod -R g=u /opt/torch

# The repository without the wheels, readable whatever umask it was cloned with.
FROM ${BASE_IMAGE} AS project
COPY . /opt/memlib
RUN rm -rf /opt/memlib/environment/wheelhouse && chmod -R u+rwX,go=u,o-w /opt/memlib

FROM ${BASE_IMAGE}
ARG TORCH=cpu
# Debian packages to add, for example "git openssh-client".
ARG EXTRA_PACKAGES=""
# tini reaps what kernels leave behind; make runs the tests. For a GPU Triton compiles with gcc.
# Versions are Debian's to choose, and what stands unquoted is a list.
# hadolint ignore=DL3008,SC2046,SC2086
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini make ${EXTRA_PACKAGES} \
        $([ "${TORCH}" != cuda ] || echo gcc libc6-dev) \
    && apt-get clean && rm -rf /var/lib/apt/lists/*

# Binder names the user. The group is `users`, whose members may write wherever this user may.
ARG NB_USER=jovyan
ARG NB_UID=1000
RUN useradd --no-log-init --create-home --uid "${NB_UID}" --gid users --shell /bin/bash "${NB_USER}" \
    && mkdir "/home/${NB_USER}/work" \
    && chown "${NB_UID}:users" "/home/${NB_USER}/work" \
    && chmod -R g=u "/home/${NB_USER}"

COPY --from=packages --chown=${NB_UID}:100 /opt/venv /opt/venv
COPY --from=torch --chown=${NB_UID}:100 /opt/torch /opt/venv
COPY --from=project --chown=${NB_UID}:100 /opt/memlib /opt/memlib
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/home/${NB_USER} \
    USER=${NB_USER} \
    JUPYTER_CONFIG_PATH=/opt/memlib/environment/jupyter

USER ${NB_UID}
RUN umask 002 \
    && pip install --no-cache-dir --no-index --no-deps --no-build-isolation -e /opt/memlib \
    && python -m compileall -qq /opt/memlib/memlib \
    && pip check

WORKDIR /home/${NB_USER}
EXPOSE 8888
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('JUPYTER_PORT', '8888') + '/api', timeout=4)"]
# Through bash: the script works without its executable bit too.
ENTRYPOINT ["tini", "-g", "--", "bash", "/opt/memlib/environment/entrypoint.sh"]
CMD ["lab"]
