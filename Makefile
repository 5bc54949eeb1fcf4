# Two commands do everything on a fresh machine: `make book` and `make test`.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
B := .venv/bin

# Where `make data` puts the full sets, and where the chapters look first
export LIB_DATA ?= $(CURDIR)/.data
# uv does not read pip's settings: hand it the folder of local wheels if pip has one
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Two workers on two cores: more threads would only wait for one another
export OMP_NUM_THREADS ?= 1

BOOK  := $(B)/jupyter-book build . -W --keep-going -n
STEMS := $(notdir $(basename $(wildcard benchmarks/[a-z]*.py)))

.PHONY: book test data sets bench reproduce pairs formulas lint serve clean

book: .venv/ready sets            ## build the book into _build/html
	$(BOOK)
	@echo "The book is at _build/html/index.html"

test: .venv/ready sets lint       ## pass all tests: code, formulas, chapters, pages, Colab
	$(B)/python -m pytest -q -m "not book" --nbval-lax --nbval-current-env \
		--nbval-cell-timeout=600 -n 2 --dist loadfile chapters tests lib
	$(BOOK)
	$(B)/python -m pytest -q -m book -n 2 --dist loadgroup tests/book

data: .venv/ready                 ## fetch the full data sets into $(LIB_DATA)
	$(B)/python -m lib.data --into $(LIB_DATA)

sets: .venv/ready                 # a chapter can do without the full sets, and says so
	@$(B)/python -m lib.data --into $(LIB_DATA) || \
		echo "Some full data sets are missing; the chapters that need them will run on small ones."

bench: .venv/ready                ## time the library against its peers
	$(foreach stem,$(STEMS),OMP_NUM_THREADS= $(B)/python benchmarks/$(stem).py | tee results/bench_$(stem).txt;)

reproduce: .venv/ready            ## run the full-size experiments (hours), resumable
	OMP_NUM_THREADS= $(B)/python -m lib.reproduce

pairs: .venv/ready                ## chapters/*.md -> chapters/*.ipynb, never the other way
	$(B)/python -m lib.book.pairs

formulas: .venv/ready             ## put all formulas on trial and write the page that lists them
	$(B)/python -m lib.book.formulas $(READ)

lint: .venv/ready
	$(B)/ruff check .
	$(B)/ruff format --check .
	$(B)/mypy

serve: book                       ## read the book at http://localhost:8000
	$(B)/python -m http.server --directory _build/html 8000

clean:
	rm -rf _build

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(B)/python -m pip install -q uv
	$(B)/uv pip install -q -p .venv "$(TORCH)" -r requirements.txt
	$(B)/uv pip install -q -p .venv --no-deps -e .
	touch $@
