"""An `npu` or an `mps` without the hardware: computes on the CPU, refuses what the real one does.

After `install` the process seems to have such a device. That cannot say whether Apple's or Ascend's
kernels are right (`python -m tools.doctor` on the machine itself does); it says whether a program
puts its tensors where they belong and asks of the device what it has:

- tensors of different devices do not meet, except for numbers (0-dim) and CPU indices;
- .cuda(), and an integer as a device, mean cuda, which is not here; .numpy() needs .cpu();
- float64, pinned memory and non_blocking copies are not for mps;
- autocast computes each operation in the dtype that the real ones choose;
- random numbers come from a generator of the device's own.

Waiting for the device costs time on real hardware, so the lines that waited are noted in `waits`.

How: PrivateUse1, the dispatch key torch keeps for devices it does not know, takes the name. Its
tensors are wrappers around CPU tensors, its kernels are the CPU's. The name can be set once per
process, hence a program of its own. Not simulated: several devices, streams, torch.compile, and
operations that change a tensor's shape in place.
"""
import contextlib
import os
import sys
import types

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

HELPER = "_setup_privateuseone_for_python_backend"  # since about torch 2.9, and private
# An mps goes by another name inside torch, which reserves its own for the real one.
name = shown = ""  # what torch calls the device, what the program calls it
keep = []  # libraries of kernels are undone when they are collected
generator = torch.Generator()  # the device's own
waits = []  # the lines that waited for the device


def note_wait():
    """Remember the line that waits: the innermost one outside torch and this file."""
    frame, folder = sys._getframe(1), os.path.dirname(torch.__file__)
    while frame.f_back and frame.f_code.co_filename.startswith((folder, __file__, "<")):
        frame = frame.f_back
    waits.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")


# -----------------------------------------------------------------------------
# Tensors and kernels

class OnDevice(torch.Tensor):
    """A tensor on the device; `raw` is the CPU tensor that holds its numbers."""

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device=torch.device(name, 0))

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self, *, tensor_contents=None):
        return f"{self.raw!r} on {shown}"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def tolist(self):
        return self.detach().cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {shown}:0 device type tensor to numpy. Use Tensor.cpu() to "
                        "copy the tensor to host memory first.")

    __array__ = numpy


INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# The size of the result, or a number, has to be known on the host. (.item() is the first.)
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select",
           "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave"}


def compute(operation, args, kwargs):
    """Run one ATen operation on the tensors inside, after the checks a device would make."""
    called = operation._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    device = kwargs.get("device")
    here = bool(ours) if device is None else torch.device(device).type == name
    if called in ("aten::_to_copy", "aten::copy_"):
        check_copy(called, args, here)
    else:
        check_places(called, args, kwargs, bool(ours))
    if called in WAITING or called in INDEXING and any(
            x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1])
            if isinstance(x, torch.Tensor)):
        note_wait()
    kwargs = {key: x for key, x in kwargs.items() if key not in ("device", "pin_memory")}
    if device is not None:
        kwargs["device"] = torch.device("cpu") if here else device
    raw_args, raw_kwargs = tree_map(lambda x: x.raw if isinstance(x, OnDevice) else x,
                                    (args, kwargs))
    with own_generator(here and torch.Tag.nondeterministic_seeded in operation.tags):
        result = operation(*raw_args, **raw_kwargs)
    if called == "aten::copy_":
        return args[0]
    known = {id(x.raw): x for x in ours}  # an operation in place gives back what it was given

    def wrap(x):
        if not isinstance(x, torch.Tensor) or not here:
            return x
        if x.dtype == torch.float64 and shown == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework "
                            "doesn't support float64. Please use float32 instead.")
        if id(x) in known:
            if known[id(x)].shape != x.shape:
                raise NotImplementedError(f"{called} changes a shape in place; not simulated")
            return known[id(x)]
        return OnDevice(x)
    return tree_map(wrap, result)


def check_places(called, args, kwargs, some_here):
    """Raise as torch does where tensors of two devices meet."""
    if called in INDEXING:  # indices may lie on the CPU, and travel; not the other way round
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        if not isinstance(args[0], OnDevice) and any(isinstance(x, OnDevice) for x in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the "
                               "indexed tensor (cpu)")
        args = (args[0], *args[2:])
    strangers = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
                 and not isinstance(x, OnDevice) and x.dim()]
    if some_here and strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{shown}:0 and {strangers[0].device}! (when checking an argument of {called})")


def check_copy(called, args, here):
    """args: (destination, source, non_blocking) of copy_, (source, ...) of _to_copy."""
    if called == "aten::_to_copy":
        if not here:
            note_wait()
        return
    target, source = args[:2]
    if isinstance(target, OnDevice) == isinstance(source, OnDevice):
        return
    if shown == "mps" and len(args) > 2 and args[2]:
        raise RuntimeError("a non_blocking copy to or from mps loses data silently before "
                           "torch 2.13")
    if isinstance(source, OnDevice):
        note_wait()


@contextlib.contextmanager
def own_generator(random):
    """The device draws from a state of its own, so one that is forgotten on resume is noticed."""
    if not random:
        yield
        return
    host = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(host)


# -----------------------------------------------------------------------------
# Autocast: what the real ones list, as far as a CLIP and its relatives use it

LOW = """linear matmul mm bmm addmm baddbmm conv1d conv2d convolution _convolution einsum prelu
scaled_dot_product_attention""".split()
FP32 = """exp expm1 log log1p reciprocal rsqrt softplus layer_norm native_layer_norm group_norm
cosine_similarity nll_loss nll_loss_nd kl_div mse_loss binary_cross_entropy_with_logits logsumexp
cumsum norm.Scalar norm.ScalarOpt_dim pow.Tensor_Scalar pow.Tensor_Tensor prod sum sum.dim_IntList
softmax.int log_softmax.int""".split()
WIDEST = "cat stack addcmul addcdiv dot scatter_add".split()


def autocast_kernel(operation, dtype_of):
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(x, dtype):
        castable = isinstance(x, OnDevice) and x.is_floating_point()
        return x.to(dtype) if castable and x.dtype not in (dtype, torch.float64) else x

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(key):
            dtype = dtype_of((args, kwargs))
            return operation(*tree_map(lambda x: cast(x, dtype), args),
                             **tree_map(lambda x: cast(x, dtype), kwargs))
    return kernel


def widest(arguments):
    dtypes = {x.dtype for x in tree_leaves(arguments) if isinstance(x, OnDevice)}
    return torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype(name)


def operation_named(full):
    base, _, overload = full.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")


def install_kernels():
    """The CPU's kernels under the device's key, factories and autocast rules among them."""
    rest, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    keep.extend((rest, aten))
    rest.fallback(lambda operation, *args, **kwargs: compute(operation, args, kwargs),
                  "PrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for full in torch._C._dispatch_get_all_op_names():  # arange, ...: a fallback is too late
        if not full.startswith("aten::"):
            continue
        operation = operation_named(full[6:])
        inputs, outputs = operation._schema.arguments, operation._schema.returns
        if (len(outputs) == 1 and "Tensor" in str(outputs[0].type)
                and any(x.name == "device" for x in inputs)
                and not any("Tensor" in str(x.type) for x in inputs)):
            with contextlib.suppress(RuntimeError):
                aten.impl(full[6:], lambda *args, _operation=operation, **kwargs: compute(
                    _operation, args, kwargs), "PrivateUse1")
    for rule, operations in ((lambda _: torch.get_autocast_dtype(name), LOW),
                             (lambda _: torch.float32, FP32), (widest, WIDEST)):
        for full in operations:
            aten.impl(full, autocast_kernel(operation_named(full), rule), "AutocastPrivateUse1")


# -----------------------------------------------------------------------------
# The module torch.npu, and what stands for torch.mps

class Module:
    """What programs use of torch.npu, with the signatures of the real one."""
    def is_available(self): return True
    def is_initialized(self): return True
    def device_count(self): return 1
    def current_device(self): return 0
    def set_device(self, device): assert device == 0
    def synchronize(self, device=0): note_wait()
    def max_memory_allocated(self, device=0): return 0
    def reset_peak_memory_stats(self, device=0): pass
    def get_rng_state(self, device=0): return generator.get_state()
    def set_rng_state(self, state, device=0): generator.set_state(state)
    def manual_seed_all(self, seed): generator.manual_seed(seed)
    def is_bf16_supported(self): return True
    def get_amp_supported_dtype(self): return [torch.float16, torch.bfloat16]
    def _is_in_bad_fork(self): return False
    utils = types.SimpleNamespace(is_support_inf_nan=lambda: True)


class Programs(TorchFunctionMode):
    """Between the program and torch: devices that mean cuda, and the name mps."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if means_cuda(function, args, kwargs):
            raise AssertionError("Torch not compiled with CUDA enabled")
        if function is torch.device:
            return function(*args, **kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": inside(kwargs["device"])}
        if function is torch.tensor or function is torch.as_tensor:  # in C++ unaware of wrappers
            device = kwargs.pop("device", None)
            out = function(*args, **kwargs)
            return out if device is None else out.to(device)
        out = function(*map(inside, args), **kwargs)
        return torch.device("mps", 0) if shown == "mps" and (
            isinstance(out, torch.device) and out.type == name) else out


def means_cuda(function, args, kwargs):
    asked = [kwargs.get("device")]
    if function is torch.Tensor.to:
        asked += args[1:2]
    elif function in (torch.device, torch._C._nn._parse_to):
        asked += args[:1]
    named = [str(x) for x in asked if isinstance(x, (str, torch.device))]
    return (function is torch.Tensor.cuda or any(type(x) is int for x in asked)
            or function is not torch.device and any(x.startswith("cuda") for x in named))


def inside(device):
    """The name that torch knows, for the name the program uses."""
    if shown == "mps":
        if isinstance(device, torch.device) and device.type == "mps":
            return torch.device(name, 0)
        if isinstance(device, str) and device in ("mps", "mps:0"):
            return name
    return device


def install_mps():
    """torch.mps and friends, answered by the device."""
    import torch._dynamo  # noqa: F401  loaded later, it trips over the patches below
    for owner in (torch.autocast, torch.amp.GradScaler):
        def renamed(self, device="cuda", *args, _init=owner.__init__, **kwargs):
            _init(self, inside(kwargs.pop("device_type", device)), *args, **kwargs)
        owner.__init__ = renamed
    torch.backends.mps.is_available = lambda: True
    torch.mps.synchronize = note_wait
    torch.mps.driver_allocated_memory = lambda: 0
    torch.mps.get_rng_state = lambda device="mps": generator.get_state()
    torch.mps.set_rng_state = lambda state, device="mps": generator.set_state(state)
    torch.mps.manual_seed = generator.manual_seed


def install_pinned_memory():
    def pin_memory(self, device=None):
        if shown == "mps" or isinstance(self, OnDevice):
            raise RuntimeError(f"cannot pin memory for {shown}")
        pinned = self.clone()
        pinned.pinned = True
        return pinned
    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.is_pinned = lambda self, device=None: getattr(self, "pinned", False)


def install(device):
    """From here on this process has an `npu` or an `mps`. Returns what stays active with it."""
    global name, shown
    shown, name = device, {"npu": "npu", "mps": "simulated"}[device]
    # Backward in the calling thread: the mode below belongs to a thread.
    torch.autograd.set_multithreading_enabled(False)
    getattr(backend_registration, HELPER)(name, backend_module=Module())
    install_kernels()
    install_pinned_memory()
    if device == "mps":
        install_mps()
    return Programs()
