"""The text corpus: prose that ships with the Python that runs the build.

Language reference topics, docstrings, comment blocks and the licence, all under the PSF licence. Wrapped lines
are joined into paragraphs, and paragraphs that are mostly code or tables are left out.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3"}
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#[^\n]*\n){2,}", re.MULTILINE)
_LETTERS = re.compile(r"[A-Za-z ,.']")


def corpus() -> list[str]:
    """One document per source, in a fixed order; each is paragraphs separated by a blank line."""
    documents = [*_topics(), *_licences(), *_modules(), *_builtin_modules()]
    return [text for text in (clean(document) for document in documents) if len(text) > 80]


def common_words(documents: list[str], count: int) -> list[str]:
    """The `count` most frequent lower-case words of 3 to 9 letters, most frequent first."""
    words = Counter(word for text in documents for word in re.findall(r"(?<![\w.])[a-z]{3,9}(?![\w.(])", text))
    return [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))[:count]]


def module_summaries() -> dict[str, str]:
    """Module name -> the first sentence of its docstring, for the standard library's public modules."""
    summaries: dict[str, str] = {}
    for name in sorted(sys.stdlib_module_names):
        source = _stdlib() / f"{name}.py"
        package = _stdlib() / name / "__init__.py"
        path = source if source.exists() else package
        if name.startswith("_") or not path.exists():
            continue
        summary = _first_sentence(ast.get_docstring(_parse(path)) or "")
        if summary:
            summaries[name] = summary
    return summaries


def builtin_summaries() -> dict[str, str]:
    """Name of a builtin function or class -> the first sentence of its docstring."""
    import builtins

    named = {name: inspect.getdoc(getattr(builtins, name)) or "" for name in sorted(dir(builtins)) if name[0].islower()}
    summaries = {name: _first_sentence(doc) for name, doc in named.items()}
    return {name: summary for name, summary in summaries.items() if summary}


def clean(text: str) -> str:
    """Join wrapped lines into paragraphs and drop the paragraphs that are not prose."""
    kept: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines() if not line.lstrip().startswith((">>>", "...", ".. "))]
        paragraph = re.sub(r"\s+", " ", " ".join(lines)).strip()
        if len(paragraph) >= 30 and _is_prose(paragraph):
            kept.append(paragraph)
    return "\n\n".join(kept)


def _is_prose(paragraph: str) -> bool:
    letters = len(_LETTERS.findall(paragraph))
    return letters / len(paragraph) > 0.9 and paragraph.count(" ") >= 4


def _first_sentence(doc: str) -> str:
    paragraph = re.sub(r"\s+", " ", doc.strip().split("\n\n")[0]).strip()
    sentence = re.split(r"(?<=[a-z)])\.\s", paragraph + " ")[0].strip().rstrip(".")
    fits = 20 <= len(sentence) <= 90 and "->" not in sentence and _is_prose(sentence)
    return sentence + "." if fits else ""


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _topics() -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield from (topics[name] for name in sorted(topics))


def _licences() -> Iterator[str]:
    for name in ("LICENSE.txt", "LICENSE"):
        path = _stdlib() / name
        if path.exists():
            yield path.read_text(encoding="utf-8", errors="ignore")
            return


def _modules() -> Iterator[str]:
    for path in sorted(_stdlib().rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(_stdlib()).parts):
            yield "\n\n".join(_prose_of(path))


def _prose_of(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8", errors="ignore")
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for block in _COMMENT_BLOCK.findall(source):
        yield "\n".join(line.strip().lstrip("#! ") for line in block.splitlines())


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _builtin_modules() -> Iterator[str]:
    for name in sorted({"builtins", "collections", *sys.builtin_module_names}):
        module = importlib.import_module(name)
        yield "\n\n".join(_docs_of(module))


def _docs_of(module: object) -> Iterator[str]:
    for name in sorted(vars(module)):
        value = getattr(module, name, None)
        if name.startswith("__") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        yield inspect.getdoc(value) or ""
        if inspect.isclass(value):
            yield from (inspect.getdoc(member) or "" for _, member in sorted(vars(value).items()) if callable(member))
