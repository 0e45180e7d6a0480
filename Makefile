# Everything runs from a virtual environment that these targets make and fill.
VENV ?= .venv
PYTHON := $(VENV)/bin/python

# The base that `make demo` trains on. To use SDXL itself, make this one line say:
#   BASE = stabilityai/stable-diffusion-xl-base-1.0
BASE = assets/tiny-sdxl

SUBJECT = assets/subjects/cat
PROMPT = a photo of [V] cat

# What the tiny base needs otherwise than SDXL; without these the defaults, the paper's run, are in force. Both methods
# have the same rank, and each the learning rate that was best for it on another subject, the rabbit.
ifeq ($(BASE),assets/tiny-sdxl)
METHODS = lora="--method lora --rank 16 --learning_rate 2e-3" nora="--method nora --rank 16 --learning_rate 2e-3"
TRAIN = --lr_scheduler cosine --max_train_steps 1000
COMPARE = --clip assets/tiny-clip --dino assets/tiny-dino --attributes assets/tiny-attributes --jobs 2 \
	--seeds 1000 1001 --num_inference_steps 30
else
METHODS = lora nora
endif

OUT = out/demo

.PHONY: demo test bench check format

demo: $(VENV)/.installed
	@echo "The base is $(BASE). assets/tiny-sdxl is a tiny SDXL (128 x 128 pixels, a small world of drawings),"
	@echo "made for trying things out on a CPU. For SDXL itself change one line of the Makefile: BASE = ..."
	@$(PYTHON) -m trainer.compare --methods $(METHODS) $(COMPARE) --output_dir $(OUT) -- \
		--pretrained_model_name_or_path $(BASE) $(TRAIN) --instance_data_dir $(SUBJECT) --instance_prompt "$(PROMPT)"

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTHON) -m pytest --numprocesses auto --dist worksteal

# Goals of docs/performance.md, on idle cores; FULL=1 adds the rows that need 18 GB and an hour.
bench: $(VENV)/.installed
	@HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks $(if $(FULL),--full)

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.installed: requirements.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --requirement requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PYTHON) -m pip install --requirement requirements-dev.txt
	@touch $@
