// A device of its own for torch that lives in host memory ("fakegpu", key PrivateUse1), with real autograd.
//
// It finds without a GPU what a GPU would punish: an operation that mixes its tensors with CPU tensors raises, and what makes
// the host wait for the device (copies to the host, .item(), operations whose result has a size that only the device knows)
// is counted by name. Operations themselves run on the CPU, by torch's fallback.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

#include <cstring>
#include <map>
#include <string>

namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr auto kFake = at::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// Events

std::map<std::string, int64_t> event_counts;
py::object listener = py::none();
thread_local int fallback_depth = 0;  // copies inside the fallback are its own, not the program's

void note(const std::string& event) {
  if (fallback_depth > 0) return;
  ++event_counts[event];
  if (listener.is_none()) return;
  py::gil_scoped_acquire gil;
  listener(event);
}

// Memory

struct HostAllocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes);
    return {memory, memory, &c10::free_cpu, at::Device(kFake, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const final { std::memcpy(to, from, bytes); }
};
HostAllocator allocator;
REGISTER_ALLOCATOR(kFake, &allocator);

// One device, one stream, nothing asynchronous

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kFake; }
  c10::Device exchangeDevice(c10::Device device) const override { return device; }
  c10::Device getDevice() const override { return {kFake, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::detail::createCPUGenerator();
    return generator;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  bool isPinnedPtr(const void*) const override { return false; }
};
Hooks hooks;

bool is_fake(const Tensor& tensor) { return tensor.device().type() == kFake; }

// The same memory as a CPU tensor.
Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined() || !is_fake(tensor)) return tensor;
  at::AutoDispatchBelowADInplaceOrView guard;
  auto keep = [storage = tensor.storage()](void*) {};
  return at::from_blob(const_cast<void*>(tensor.storage().data()), tensor.sizes(), tensor.strides(),
                       tensor.storage_offset(), keep, tensor.options().device(at::kCPU), at::kCPU);
}

// Making, copying and viewing: what the fallback cannot do

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(type));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (is_fake(from) && !is_fake(to)) note("copy to the host");
  if (!is_fake(from) && is_fake(to)) note("copy to the device");
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) const_cast<Tensor&>(to).resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  note("item");
  return at::_local_scalar_dense(on_host(tensor));
}

Tensor& set_storage(Tensor& tensor, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return tensor;
}

Tensor strided_view(const Tensor& tensor, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(tensor.storage()),
                                                       tensor.key_set(), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(tensor.storage_offset()));
  return made;
}

Tensor same_storage(const Tensor& tensor, IntArrayRef size, IntArrayRef stride) {
  return strided_view(tensor, size, stride, tensor.storage_offset());
}

Tensor view(const Tensor& tensor, IntArrayRef size) {
  const auto shape = on_host(tensor).view(size);
  return same_storage(tensor, shape.sizes(), shape.strides());
}

Tensor unfold_view(const Tensor& tensor, int64_t dimension, int64_t length, int64_t step) {
  const auto shape = on_host(tensor).unfold(dimension, length, step);
  return same_storage(tensor, shape.sizes(), shape.strides());
}

const Tensor& resize(const Tensor& tensor, IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const size_t needed = (impl->storage_offset() + impl->numel()) * impl->dtype().itemsize();
  if (needed > impl->storage().nbytes()) {
    const auto fresh = at::detail::empty_generic(size, &allocator, kKeys, tensor.scalar_type(), std::nullopt);
    impl->set_storage_keep_dtype(c10::Storage(fresh.storage()));
  }
  return tensor;
}

// Everything else: on the CPU, after a look at the arguments

bool starts_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

struct Arguments {
  std::string mismatch;  // a CPU tensor among ours; scalars may be
  bool has_mask = false;
  bool has_cpu_index = false;

  void look(const Tensor& tensor, bool as_index) {
    if (!tensor.defined()) return;
    if (tensor.scalar_type() == at::kBool) has_mask = true;
    if (!tensor.device().is_cpu() || tensor.dim() == 0) return;
    if (as_index) {
      has_cpu_index = true;
    } else {
      mismatch = std::string(at::toString(tensor.scalar_type())) + ", " + std::to_string(tensor.numel()) + " elements";
    }
  }
};

void fallback(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto name = operation.schema().operator_name().name;
  const bool indexes = starts_with(name, "aten::index") || starts_with(name, "aten::_index");
  Arguments seen;
  for (const auto& value : torch::jit::last(stack, operation.schema().arguments().size())) {
    if (value.isTensor()) {
      Arguments own;
      own.look(value.toTensor(), false);
      if (!own.mismatch.empty()) seen.mismatch = own.mismatch;
    } else if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorVector()) seen.look(tensor, false);
    } else if (value.isList()) {
      for (const auto& entry : value.toListRef()) {
        if (entry.isTensor()) seen.look(entry.toTensor(), indexes);
      }
    }
  }
  if (!seen.mismatch.empty()) {
    note("mismatch in " + name);
    TORCH_CHECK(false, "device mismatch in ", name, ": a CPU tensor (", seen.mismatch, ") among tensors of fakegpu");
  }
  if (seen.has_cpu_index) note("copy of an index to the device");
  if (indexes && seen.has_mask) note("boolean index in " + name);
  for (const char* waiting : {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
                              "aten::repeat_interleave"}) {
    if (name == waiting) note("wait in " + name);
  }
  struct Inside {
    Inside() { ++fallback_depth; }
    ~Inside() { --fallback_depth; }
  } inside;
  at::native::cpu_fallback(operation, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &item);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("as_strided", &strided_view);
  library.impl("_reshape_alias", &same_storage);
  library.impl("view", &view);
  library.impl("unfold", &unfold_view);
  library.impl("resize_", &resize);
}

// Autocast, by torch's own lists of what runs in the lower precision and what in float32

#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // the macros call it m
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(IN_FP32)
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  module.def("counts", [] { return event_counts; });
  module.def("reset", [] { event_counts.clear(); });
  module.def("listen", [](py::object callable) { listener = std::move(callable); });
}
