# One verb each; `make help` lists them.

PYTHON := .venv/bin/python
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo chat test check profile bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## create .venv with the package, SGLang and the development tools

$(INSTALLED): pyproject.toml constraints.txt scripts/install
	scripts/install
	@touch $@

demo: install ## plain, EAGLE-3 and CAST side by side on this machine, within ten minutes
	$(PYTHON) -m examples.demo $(ARGS)

chat: install ## talk to a model under CAST and see what each step brought
	@$(PYTHON) -m examples.chat $(ARGS)

# Two workers, each with servers of its own. A file's tests stay together, and files in their order:
# the long ones, which start servers, come before many short ones.
test: install ## the tests; some start real servers
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-extended: install ## a soak under faults, Triton's interpreter, rarer drafts: the tests of minutes
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m extended $(ARGS)

check: install ## lint, format and types
	scripts/check

profile: install ## measure a cost profile: make profile ARGS="--model-path T --speculative-draft-model-path D"
	.venv/bin/cast-sglang profile $(ARGS)

bench: install ## compare serving speed of several arms: make bench ARGS="--batches 1,8"
	$(PYTHON) -m benchmarks.bench_serving $(ARGS)

clean: ## remove what the other verbs made, .venv included
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis out build dist
