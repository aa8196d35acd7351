#!/usr/bin/env bash
# Builds the documentation site into build/site, in a separate environment that needs neither torch nor the package.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/docs.sh [--serve]

  --serve  rebuild as files change, and show the site at http://127.0.0.1:8000
  --help   this text

The first call makes an environment with the versions of scripts/requirements/constraints-docs.txt: build/docs-env, or
the folder that $DOCS_ENV names; $PYTHON names its Python (default: python3).
TEXT
}

serve=""
case "${1:-}" in
"") ;;
--serve) serve=yes ;;
-h | --help) usage && exit 0 ;;
*) usage >&2 && echo "docs: unknown argument: $1" >&2 && exit 1 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment=${DOCS_ENV:-build/docs-env}
python=$environment/bin/python
if ! "$python" -c 'import mkdocs, material, mkdocstrings_handlers.python' 2>/dev/null; then
    echo "docs: making $environment"
    "${PYTHON:-python3}" -m venv --clear "$environment"
    "$python" -m pip install -q --disable-pip-version-check -c scripts/requirements/constraints-docs.txt \
        mkdocs mkdocs-material "mkdocstrings[python]"
fi
# Suppresses a warning of mkdocs-material about releases of mkdocs that these pins exclude.
export NO_MKDOCS_2_WARNING=1
if [ -n "$serve" ]; then
    exec "$python" -m mkdocs serve
fi
"$python" -m mkdocs build --strict --quiet
# The site must not make a reader's browser fetch anything from another host.
if grep -rhoE '<(script|img|iframe)[^>]*src="?https?://[^ ">]*|<link[^>]*rel="?(stylesheet|preconnect)[^>]*href="?https?://[^ ">]*' \
    --include='*.html' build/site; then
    echo "docs: the pages above fetch something from another host" >&2
    exit 1
fi
echo "docs: $(find build/site -name '*.html' | wc -l) pages in build/site"
