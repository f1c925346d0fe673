# SENetV2 in four scripts.  `make` alone lists what there is to type.

# Left empty, a variable takes the default of train.py (see `python train.py --help`).
flag = $(if $($(1)),--$(2) $($(1)))
COMMON = $(call flag,DATA_DIR,data-dir) $(call flag,RECIPE,recipe) $(call flag,STEM,stem) $(call flag,EPOCHS,epochs) \
  $(call flag,BATCH_SIZE,batch-size) $(call flag,LR,lr) $(call flag,TRAIN_IMAGES,train-images) \
  $(call flag,IMAGES_PER_CLASS,images-per-class) $(call flag,IMAGE_SIZE,image-size) $(call flag,DEVICE,device) $(ARGS)
FLAGS = $(call flag,DATASET,dataset) $(call flag,MODEL,model) $(call flag,LAYERS,layers) $(call flag,REDUCTION,reduction) \
  $(call flag,CARDINALITY,cardinality) $(call flag,SEED,seed) $(call flag,WEIGHTS,weights) $(call flag,OUT,out) $(COMMON)

# Without PYTHON=..., the packages of requirements.txt go into .venv the first time (minutes, several GB).
ifndef PYTHON
PYTHON := .venv/bin/python
READY := .venv/ready
endif

# glibc: keep freed memory, do not give large tensors back to the system at every step and fetch them anew, page by page.
# It changes no result; SENetV2-50 on 224-pixel images, on two cores, trains 1.6 times as fast (9.6 against 6.1 images/s).
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 8589934592
export MALLOC_TOP_PAD_ = 268435456

# Several processes, one a GPU; without GPUs they share the cores.
TRAIN = $(PYTHON)$(if $(NPROC), -m torch.distributed.run --standalone --nproc-per-node $(NPROC)) train.py

# The experiments: ordinary training commands, seed by seed, so that a stopped one has whole comparisons; a finished run
# is skipped, a half-finished one goes on.  K layers at r are one of width K/r, so each width is run once:
# senet r = 32 is K = 1, senet r = 16 is K = 2, senetv2 is K = 4 and senet r = 8, senet r = 4 is K = 8, senet r = 2 is K = 16.
SEEDS ?= 0 1 2 3 4
RESNET50 := 3,4,6,3
SMALL := 1,1,1,1
jobs = $(if $(DATASETS)$(LAYERS),$(foreach d,$(or $(DATASETS),$(sort $(foreach j,$(1),$(firstword $(subst /, ,$(j)))))),$(foreach \
  l,$(or $(LAYERS),$(RESNET50)),$(d)/$(l))),$(1))
experiment = $(foreach s,$(SEEDS),$(foreach j,$(call jobs,$(1)),$(foreach m,$(2),$(call command,$(s),$(subst /, --layers ,$(j)),$(subst +, ,$(m))))))
define command
$(TRAIN) --dataset $(2) --model $(3) --seed $(1) $(strip $(COMMON))

endef

.PHONY: help train evaluate predict test table bench look pictures paper experiment1 experiment2 experiment3 experiment4 experiment5 report clean

help:  ## this list
	@echo "make TARGET [VARIABLE=value ...]"
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3 uses an interpreter that has the packages; ARGS='...' adds any flag of the script."

train: $(READY)  ## train: DATASET=shapes|cifar10|cifar100|imagenet|folder MODEL=resnet|senet|senetv2|... DATA_DIR= RECIPE= LAYERS= STEM= REDUCTION= CARDINALITY= EPOCHS= BATCH_SIZE= LR= TRAIN_IMAGES= IMAGES_PER_CLASS= IMAGE_SIZE= WEIGHTS= SEED= DEVICE= OUT= NPROC=
	$(TRAIN) $(strip $(FLAGS))

evaluate: $(READY)  ## loss, top-1, top-5, accuracy of each class: CHECKPOINT=runs/NAME/last.pt DATA_DIR=, or train's variables
	$(PYTHON) train.py --evaluate $(strip $(call flag,CHECKPOINT,checkpoint) $(FLAGS))

predict: $(READY)  ## the five most likely classes: IMAGE='a.jpg b.png' CHECKPOINT=runs/NAME/last.pt
	$(PYTHON) train.py --predict $(IMAGE) $(call flag,CHECKPOINT,checkpoint) $(strip $(FLAGS))

table: $(READY)  ## parameters and multiply-adds beside the paper's
	$(PYTHON) senetv2.py $(ARGS)

bench: $(READY)  ## images/s of training and loading, and what the gate costs: STEM= LAYERS= BATCH_SIZE= DATASET= DATA_DIR= ARGS='--compile --image-size 224'
	$(PYTHON) senetv2.py --benchmark $(call flag,STEM,stem) $(call flag,LAYERS,layers) $(call flag,BATCH_SIZE,batch-size) $(ARGS)
	$(PYTHON) data.py --benchmark $(call flag,DATASET,dataset) $(call flag,DATA_DIR,data-dir)
	$(PYTHON) test_senetv2.py

paper: $(READY)  ## the paper's tables, all four widths of the gate: SEEDS= EPOCHS= TRAIN_IMAGES= RECIPE= DATASETS= LAYERS= DATA_DIR=
	$(call experiment,cifar100/$(RESNET50) cifar10/$(SMALL) cifar10/$(RESNET50),resnet senet senet+--reduction+16 senetv2)

experiment1: $(READY)  ## one branch against two, CIFAR-10; variables as above
	$(call experiment,cifar10/$(RESNET50),senet senet+--reduction+16)

experiment2: $(READY)  ## K = 2, 4, 8, 16, CIFAR-100
	$(call experiment,cifar100/$(RESNET50),senet+--reduction+16 senetv2 senet+--reduction+4 senet+--reduction+2)

experiment3: $(READY)  ## r = 8, 16, 32, CIFAR-10
	$(call experiment,cifar10/$(RESNET50),senetv2 senet+--reduction+16 senet)

experiment4: $(READY)  ## gate x by 1 + s, as the released code, or by s, CIFAR-10
	$(call experiment,cifar10/$(RESNET50),senetv2 senetv2+--residual)

experiment5: $(READY)  ## the peers, CIFAR-100
	$(call experiment,cifar100/$(RESNET50),mobilenet_v2 efficientnet_b0 resnext50_32x4d vit)

report: $(READY)  ## tables and charts of all runs below runs/ and results/, as Markdown
	@$(PYTHON) train.py --report runs results

look: $(READY)  ## a contact sheet of the data, before and after augmentation: DATASET= DATA_DIR=
	$(PYTHON) data.py $(call flag,DATASET,dataset) $(call flag,DATA_DIR,data-dir) $(ARGS)

test: $(READY)  ## check every claim of README and docstrings
	$(PYTHON) -m pytest -q $(ARGS)

pictures: train evaluate  ## draw the README's pictures anew (with train's defaults)
	$(PYTHON) data.py --out assets/shapes.png
	cp runs/shapes-senetv2-paper-seed0/gates.png assets/gates.png

clean:  ## remove .venv and caches; runs and data stay
	rm -rf .venv .pytest_cache __pycache__

.venv/ready: requirements.txt
	@echo "installing requirements.txt into .venv: minutes and several GB, this once"
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	@touch $@
