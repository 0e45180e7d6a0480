# Everything runs from a virtual environment that these targets make and fill.
VENV ?= .venv
PYTHON := $(VENV)/bin/python

# The base that `make demo` trains on. To use SDXL itself, make this one line say:
#   BASE = stabilityai/stable-diffusion-xl-base-1.0
# (the flags behind the tiny base's name are its own; without them the defaults, the paper's run, are in force).
BASE = assets/tiny-sdxl --learning_rate 1.5e-3 --lr_scheduler cosine --max_train_steps 800

SUBJECT = assets/subjects/robot
PROMPT = a photo of [V] robot
OUT = out/demo

.PHONY: demo test check format

demo: $(VENV)/.installed
	@echo "The base is $(firstword $(BASE)). assets/tiny-sdxl is a tiny SDXL (64 x 64 pixels, a small world of drawings),"
	@echo "made for trying things out on a CPU. For SDXL itself change one line of the Makefile: BASE = ..."
	@for method in nora lora; do \
		echo "--- training $$method on $(SUBJECT)"; \
		$(PYTHON) train_dreambooth_nora_sdxl.py --pretrained_model_name_or_path $(BASE) --method $$method \
			--instance_data_dir $(SUBJECT) --instance_prompt "$(PROMPT)" --output_dir $(OUT)/$$method || exit $$?; \
	done
	@echo "--- drawing the gallery"
	@$(PYTHON) -m inference.gallery --base $(firstword $(BASE)) --adapters lora=$(OUT)/lora nora=$(OUT)/nora \
		--prompts "$(PROMPT) in the jungle" "$(PROMPT) on the beach" "$(PROMPT) in the snow" \
		"$(PROMPT) on a red background" --seeds 0 1 --instance_images $(SUBJECT) --output $(OUT)/gallery.html
	@echo "Gallery: $(OUT)/gallery.html (page) and $(OUT)/gallery.png (sheet)"

test: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

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
