# SENetV2 in four scripts.  `make` alone lists what there is to type.

# Left empty, a variable takes the default of train.py (see `python train.py --help`).
flag = $(if $($(1)),--$(2) $($(1)))
FLAGS = $(strip $(call flag,DATASET,dataset) $(call flag,MODEL,model) $(call flag,DATA_DIR,data-dir) \
  $(call flag,RECIPE,recipe) $(call flag,LAYERS,layers) $(call flag,STEM,stem) $(call flag,CARDINALITY,cardinality) \
  $(call flag,REDUCTION,reduction) $(call flag,EPOCHS,epochs) $(call flag,BATCH_SIZE,batch-size) $(call flag,LR,lr) \
  $(call flag,TRAIN_IMAGES,train-images) $(call flag,SEED,seed) $(call flag,DEVICE,device) $(call flag,OUT,out))

# Without PYTHON=..., the packages of requirements.txt go into .venv the first time (minutes, several GB).
ifndef PYTHON
PYTHON := .venv/bin/python
READY := .venv/ready
endif

# Several processes, one a GPU; without GPUs they share the cores.
TRAIN = $(PYTHON)$(if $(NPROC), -m torch.distributed.run --standalone --nproc-per-node $(NPROC)) train.py

.PHONY: help train evaluate test table bench look clean

help:  ## this list
	@echo "make TARGET [VARIABLE=value ...]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3 uses an interpreter that has the packages; ARGS='...' adds any flag of the script."

train: $(READY)  ## train: DATASET=shapes|cifar10|cifar100|imagenet MODEL=resnet|senet|senetv2 DATA_DIR= RECIPE= LAYERS= STEM= REDUCTION= CARDINALITY= EPOCHS= BATCH_SIZE= LR= TRAIN_IMAGES= SEED= DEVICE= OUT= NPROC=
	$(TRAIN) $(FLAGS) $(ARGS)

evaluate: $(READY)  ## loss, top-1, top-5, accuracy of each class: CHECKPOINT=runs/NAME/last.pt DATA_DIR=, or train's variables
	$(PYTHON) train.py --evaluate $(call flag,CHECKPOINT,checkpoint) $(FLAGS) $(ARGS)

table: $(READY)  ## parameters and multiply-adds beside the paper's
	$(PYTHON) senetv2.py $(ARGS)

bench: $(READY)  ## images/s of training and loading, and what the gate costs: STEM= LAYERS= BATCH_SIZE= DATASET= DATA_DIR= ARGS='--compile --image-size 224'
	$(PYTHON) senetv2.py --benchmark $(call flag,STEM,stem) $(call flag,LAYERS,layers) $(call flag,BATCH_SIZE,batch-size) $(ARGS)
	$(PYTHON) data.py --benchmark $(call flag,DATASET,dataset) $(call flag,DATA_DIR,data-dir)
	$(PYTHON) test_senetv2.py

look: $(READY)  ## a contact sheet of the data, before and after augmentation: DATASET= DATA_DIR=
	$(PYTHON) data.py $(call flag,DATASET,dataset) $(call flag,DATA_DIR,data-dir) $(ARGS)

test: $(READY)  ## check every claim of README and docstrings
	$(PYTHON) -m pytest -q $(ARGS)

clean:  ## remove .venv and caches; runs and data stay
	rm -rf .venv .pytest_cache __pycache__

.venv/ready: requirements.txt
	@echo "installing requirements.txt into .venv: minutes and several GB, this once"
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	@touch $@
