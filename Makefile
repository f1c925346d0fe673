# SENetV2 in four scripts.  `make` alone lists what there is to type.

# A variable counts only where it is typed on make's command line, whatever the environment holds.
# DATA_DIR=x becomes --data-dir='x'; left out, the script's default holds.
typed = $(if $(findstring command line,$(origin $(1))),$(value $(1)))
quoted = '$(subst ','\'',$(1))'
given = $(foreach name,$(1),$(if $(call typed,$(name)),$(name)))
flags = $(foreach name,$(call given,$(1)), --$(shell echo $(name) | tr A-Z_ a-z-)=$\
$(call quoted,$(value $(name))))

DATA = DATASET DATA_DIR IMAGE_SIZE
SETTINGS = $(DATA) MODEL RECIPE LAYERS STEM REDUCTION CARDINALITY WEIGHTS EPOCHS BATCH_SIZE LR $\
  TRAIN_IMAGES IMAGES_PER_CLASS HOLD_OUT SEED NAME DEVICE PRECISION OUT
ARGUMENTS = $(if $(call typed,ARGS), $(ARGS))
FLAGS = $(call flags,$(SETTINGS))$(ARGUMENTS)

# A misspelt variable is an error.
NAMES = $(SETTINGS) ARGS NPROC PYTHON CHECKPOINT IMAGE MINUS SEEDS TRAIN
$(foreach name,$(filter-out $(NAMES),$(.VARIABLES)),$(if $(call typed,$(name)),$\
  $(error unknown variable $(name); `make` lists the valid ones)))

# So is one without a value, most often an unset variable of a shell.
$(foreach name,$(filter-out ARGS,$(NAMES)),$(if $(findstring command line,$(origin $(name))),$\
  $(if $(strip $(value $(name))),,$(error $(name) is empty; leave it out, or give it a value))))

# So is a word that is no target: `make train EPOCHS 3` would train before make came to EPOCHS.
TARGETS = help train evaluate predict look table test bench faults pictures report results paper $\
  experiment1 experiment2 experiment3 experiment4 experiment5 experiment6 clean
$(foreach word,$(filter-out $(TARGETS) .venv/ready,$(MAKECMDGOALS)),$\
  $(error $(word) is no target; a variable is typed with =, as in EPOCHS=3))

# So is a variable that no target given has a use for, or that it sets itself.
RUNS = $(filter-out SEED OUT MODEL,$(SETTINGS)) ARGS NPROC SEEDS TRAIN
USES_paper = $(filter-out REDUCTION,$(RUNS))
USES_train = $(if $(call typed,SEEDS),$(filter-out SEED OUT,$(SETTINGS)),$(SETTINGS)) ARGS NPROC SEEDS
USES_evaluate = $(SETTINGS) ARGS CHECKPOINT
USES_predict = $(SETTINGS) ARGS CHECKPOINT IMAGE
USES_look = $(DATA) OUT
USES_table = STEM IMAGE_SIZE ARGS
USES_bench = $(DATA) LAYERS STEM BATCH_SIZE PRECISION ARGS
USES_test = ARGS
USES_report = MINUS
USES_faults = ARGS
USED = PYTHON $(foreach goal,$(MAKECMDGOALS),$(USES_$(goal)) $\
  $(if $(filter experiment1 experiment2 experiment3,$(goal)),$(USES_paper)) $\
  $(if $(filter experiment4 experiment5 experiment6,$(goal)),$(RUNS)))
$(if $(MAKECMDGOALS),$(foreach name,$(filter-out $(USED),$(NAMES)),$(if $(call typed,$(name)),$\
  $(error `make $(MAKECMDGOALS)` has no use for $(name), or sets it itself))))
$(if $(call typed,NPROC),$(if $(shell test '$(NPROC)' -ge 1 2>/dev/null && echo yes),,$\
  $(error NPROC is '$(NPROC)'; give a number of processes, 1 or more)))

# Without PYTHON=..., the packages of requirements.txt go into .venv the first time.
PYTHON = .venv/bin/python
READY := $(if $(call typed,PYTHON)$(call typed,TRAIN),,.venv/ready)

AFTER_ONE = make evaluate, or make predict IMAGE=file, with the same variables$\
  $(if $(call typed,NPROC), but NPROC)

# Several processes, one per GPU; without GPUs they share the cores.
LAUNCHER = -m torch.distributed.run --standalone --nproc-per-node $(NPROC)
TRAIN = $(PYTHON)$(if $(call typed,NPROC), $(LAUNCHER)) train.py

# glibc: keep freed memory instead of giving large tensors back to the system at every step.  It
# changes no result; SENetV2-50 on 224-pixel images, on two cores, trained 1.6 times as fast
# (9.6 against 6.1 images/s).
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 8589934592
export MALLOC_TOP_PAD_ = 268435456

# Not evaluate beside train, whatever -j says.
.NOTPARALLEL:

# What was typed for this make is not meant for one that a test starts.
unexport MAKEFLAGS MFLAGS

# $(call sweep,"DATA SET AND LAYERS" ...,"NETWORK" ...): one ordinary run for each, seed by seed, so
# that a sweep that was stopped holds whole comparisons.  A finished run is skipped, a half-finished
# one resumes.  What is typed comes last and wins.  `make paper TRAIN=echo` lists the commands.
SEEDS = 0 1 2 3 4
sweep = @set -e; for seed in $(SEEDS); do \
  for data in $(if $(call typed,DATASET),"$(DATASET)",$(1)); do for network in $(2); do \
  $(TRAIN) --dataset $$data --model $$network --seed $$seed$(FLAGS); done; done; done

TABLES = "cifar100 --layers 3,4,6,3" "cifar10 --layers 1,1,1,1" "cifar10 --layers 3,4,6,3"

# K layers at r are one layer at r/K, so each width of the gate is run once: K = 1, 2, 4, 8, 16 at
# r = 32 are senet with r = 32 and 16, senetv2 (= senet r = 8), and senet with r = 4 and 2.
WIDTHS = resnet senet "senet --reduction 16" senetv2

.PHONY: $(TARGETS)

help:  ## this list
	@echo "make TARGET [VARIABLE=value ...]"
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: $(SETTINGS)" | fold -s -w 88
	@echo "as in 'python train.py --help'; ARGS='...' adds any flag; NPROC=8 starts eight processes;"
	@echo "PYTHON=python3 uses an interpreter that has the packages of requirements.txt."

train: $(READY)  ## train, or resume: DATASET=shapes|cifar10|cifar100|imagenet|folder MODEL=... ...
	$(if $(call typed,SEEDS),@set -e; for seed in $(SEEDS); do $\
	  $(TRAIN)$(FLAGS) --seed $$seed; done,$(TRAIN)$(FLAGS))
	@echo "next: $(if $(call typed,SEEDS),make report,$(AFTER_ONE))"

evaluate: $(READY)  ## accuracy, and a page to look at: CHECKPOINT=... or the variables of train
	$(PYTHON) -m tools.evaluate$(call flags,CHECKPOINT)$(FLAGS)

predict: $(READY)  ## the five most likely classes: IMAGE=cat.jpg CHECKPOINT=runs/NAME
	$(if $(call typed,IMAGE),,$(error predict needs IMAGE=file))$\
	$(PYTHON) -m tools.predict$(call flags,IMAGE CHECKPOINT)$(FLAGS)

look: $(READY)  ## draw images before and after augmentation: DATASET= DATA_DIR= OUT=file.png
	$(PYTHON) -m tools.look$(call flags,$(USES_look))

table: $(READY)  ## parameters and multiply-adds beside the paper's: STEM= IMAGE_SIZE=
	$(PYTHON) -m tools.table$(call flags,STEM IMAGE_SIZE)$(ARGUMENTS)

test: $(READY)  ## check every claim of README, docs and docstrings
	$(PYTHON) -m pytest -q -rs$(ARGUMENTS)

bench: $(READY)  ## measure training, loading and the gates: STEM= LAYERS= BATCH_SIZE= DATASET= ...
	$(PYTHON) -m tools.bench$(FLAGS)

faults: $(READY)  ## disturb 100 runs at random moments, see that none is lost: ARGS='--trials 20'
	$(PYTHON) -m tools.faults$(ARGUMENTS)

pictures: $(READY)  ## redraw the README's pictures of shapes and gates
	$(TRAIN)
	$(PYTHON) -m tools.evaluate
	$(PYTHON) -m tools.look --out assets/shapes.png
	cp runs/shapes-senetv2-paper-seed0/gates.png assets/gates.png

report: $(READY)  ## tables of all runs in runs/ and results/: MINUS='a row to subtract'
	@$(PYTHON) -m tools.report runs results$(call flags,MINUS)

results: $(READY)  ## write results/README.md from results/about.md and the raw files
	{ cat results/about.md && $(PYTHON) -m tools.report results; } > results/README.tmp
	mv results/README.tmp results/README.md

paper: $(READY)  ## the paper's tables: no gate and r = 32, 16, 8: SEEDS= DATASET= LAYERS= EPOCHS= ...
	$(call sweep,$(TABLES),$(WIDTHS))

experiment1: $(READY)  ## one hidden layer or two: r = 32 and 16, CIFAR-10
	$(call sweep,cifar10,senet "senet --reduction 16")

experiment2: $(READY)  ## K = 2, 4, 8, 16, CIFAR-100
	$(call sweep,cifar100,"senet --reduction 16" senetv2 "senet --reduction 4" "senet --reduction 2")

experiment3: $(READY)  ## r = 8, 16, 32, CIFAR-10
	$(call sweep,cifar10,senetv2 "senet --reduction 16" senet)

experiment4: $(READY)  ## multiply by 1 + s, as the released code does, or by s, CIFAR-10
	$(call sweep,cifar10,senetv2 "senetv2 --residual")

experiment5: $(READY)  ## networks to compare with, CIFAR-100
	$(call sweep,cifar100,mobilenet_v2 efficientnet_b0 resnext50_32x4d vit)

experiment6: $(READY)  ## gates over a network that starts well, or as usual, CIFAR-100
	$(call sweep,cifar100,resnet "resnet --zero-init" senet "senet --zero-init" senetv2 $\
	  "senetv2 --zero-init")

clean:  ## remove .venv and caches; runs and data stay
	rm -rf .venv .pytest_cache __pycache__ support/__pycache__ tools/__pycache__ tests/__pycache__

.venv/ready: requirements.txt
	@echo "installing requirements.txt into .venv: minutes and several GB, this once"
	@echo "(if your own Python has these packages: Ctrl-C, then add PYTHON=python3)"
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	@touch $@
