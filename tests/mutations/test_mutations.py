"""The mutations fit the kernels that they change; `python -m tests.mutations` shows that the tests notice each."""

import ast

import pytest

from tests.mutations.__main__ import Mutation, mutations, source_of
from tests.mutations.table import MUTATIONS, TESTS


@pytest.mark.parametrize("module", MUTATIONS)
def test_every_mutation_applies_and_is_python(module):
    source = source_of(module)
    ast.parse(source)
    for mutation in mutations():
        if mutation.module == module:
            mutated = mutation.apply(source)
            ast.parse(mutated)
            assert mutated != source


@pytest.mark.parametrize("module", [name for name in MUTATIONS if "/triton_" in name])
def test_every_kernel_has_mutations(module):
    functions = [node.name for node in ast.parse(source_of(module)).body if isinstance(node, ast.FunctionDef)]
    assert set(MUTATIONS[module]) == set(functions)
    for name in functions:
        assert len(MUTATIONS[module][name]) >= (6 if name.endswith("_kernel") else 2), name
    assert all(TESTS[module])


def test_no_mutation_is_listed_twice():
    assert len(set(mutations())) == len(mutations())


@pytest.mark.parametrize("old, count", [("b_mean", "times"), ("not in the source", "0 times")])
def test_a_text_that_is_not_there_once_is_an_error(old, count):
    with pytest.raises(ValueError, match=count):
        Mutation("layer_norm/triton_kernels", "_fwd_kernel", old, "").apply(source_of("layer_norm/triton_kernels"))
    with pytest.raises(ValueError, match="0 functions"):
        Mutation("layer_norm/triton_kernels", "_absent", old, "").apply(source_of("layer_norm/triton_kernels"))
