# docker build -t perfusion .                            for CPUs
# docker build -t perfusion --build-arg TORCH=cu132 .    for NVIDIA GPUs: any backend that `uv pip install --torch-backend` knows
# docker run --rm -v "$PWD:/work" perfusion train +experiment=cat_oneshot
FROM python:3.12-slim

ARG TORCH=cpu
ARG UV=0.13.9

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY perfusion /src/perfusion
COPY eval /src/eval
COPY experiments /src/experiments
COPY conf /src/conf
# The pins of the CUDA libraries are those of one backend, which uv chooses itself.
RUN pip install --no-cache-dir "uv==$UV" \
    && grep -vE '^(nvidia|cuda|triton)' /src/constraints.txt > /tmp/constraints.txt \
    && uv pip install --system --no-cache --torch-backend "$TORCH" --constraint /tmp/constraints.txt /src

RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["perfusion"]
