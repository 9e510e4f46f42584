"""Without each of torch's private interfaces, the tests of the rational function that concern it pass all the same."""

import importlib

import pytest

from kan_basis import torch_internals
from tests.test_rational import (  # noqa: F401  run here once for each interface
    test_an_exported_definition_trains_denominators_that_start_at_zero,
    test_autocast_casts_the_input_as_linear_does,
    test_channels_first,
    test_half_storage_is_computed_in_float32,
    test_on_cuda,
    test_saves_only_x_and_coefficients,
    test_several_gradients_at_once,
    test_shapes_on_the_meta_device,
    test_sizes,
    test_two_runs_are_equal_to_the_bit_and_no_second_derivative,
    test_wrong_input_gets_a_sentence,
)
from tests.test_rational_cuda import (  # noqa: F401
    choose,
    operators_on_the_cpu,
    test_an_exported_program_trains_as_the_layer_does,
    test_checkpointing_ddp_workers_and_dispatch_modes,
    test_forward_mode_derivatives_are_refused,
    test_streams_graphs_autocast_compile_and_export,
    test_the_kernels_take_fake_tensors_and_leave_the_cpu_alone,
)

INTERFACES = {
    "_C._is_any_autocast_enabled": "any_autocast",
    "_C._functorch.is_legacy_batchedtensor": "is_batch",
    "_C._cuda_getCurrentRawStream": "current_stream",
    "_C._cuda_getDevice": "current_device",
    "_C._len_torch_dispatch_stack": "_dispatch_modes",
    "_C._functorch.peek_interpreter_stack": "_transform",
    "_C._get_tracing_state": "_tracing_state",
    "autograd.forward_ad._current_level": "forward_mode",
}


@pytest.fixture(autouse=True, params=INTERFACES, ids=INTERFACES.values())
def without(request, monkeypatch):
    """kan_basis.torch_internals as it is imported where torch lacks an interface."""
    with monkeypatch.context() as patch:
        patch.delattr(f"torch.{request.param}", raising=not request.param.startswith("_C._cuda"))
        importlib.reload(torch_internals)
    function = getattr(torch_internals, INTERFACES[request.param])
    assert getattr(function, "__module__", None) in (torch_internals.__name__, "torch.cuda")
    yield
    importlib.reload(torch_internals)
