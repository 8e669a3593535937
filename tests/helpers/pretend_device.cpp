// A device of the type PrivateUse1 whose memory is the host's.
//
// Every operator runs on CPU tensors that share the memory of its arguments, so the numbers are
// those of the CPU. torch itself refuses to mix this device with another one, as it does on CUDA.
// Nothing runs in the background: what a test can see is where tensors lie, not how fast they are.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Storage;
using c10::Stream;

constexpr auto kPretend = c10::DeviceType::PrivateUse1;

Device the_device() { return Device(kPretend, 0); }
Stream the_stream() { return Stream(Stream::DEFAULT, the_device()); }

// There is one device with one stream, on which everything is finished at once.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kPretend;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kPretend; }
  Device exchangeDevice(Device) const override { return the_device(); }
  Device getDevice() const override { return the_device(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return the_stream(); }
  Stream getNewStream(Device, int = 0) const override { return the_stream(); }
  Stream exchangeStream(Stream) const noexcept override { return the_stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

void free_memory(void* data) { std::free(data); }

struct HostAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t alignment = 64;
    void* data = nullptr;
    if (bytes > 0) {
      const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
      TORCH_CHECK(posix_memalign(&data, alignment, rounded) == 0, "out of memory");
    }
    return {data, data, &free_memory, the_device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_memory; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
HostAllocator allocator;
REGISTER_ALLOCATOR(kPretend, &allocator);

void resize_storage(const Storage& storage, size_t bytes) {
  auto data = allocator.allocate(bytes);
  if (storage.data()) {
    std::memcpy(data.get(), storage.data(), std::min<size_t>(bytes, storage.nbytes()));
  }
  auto* implementation = storage.unsafeGetStorageImpl();
  implementation->set_data_ptr_noswap(std::move(data));
  implementation->set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};
const bool has_hooks = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

bool is_pretend(const Tensor& t) { return t.defined() && t.device().type() == kPretend; }

// A storage on another device over the same memory, which it keeps alive.
Storage shared_storage(const Storage& storage, Device device, c10::Allocator* owner) {
  auto release = [](void* kept) { delete static_cast<Storage*>(kept); };
  c10::DataPtr data(const_cast<void*>(storage.data()), new Storage(storage), release, device);
  const auto size = Storage::use_byte_size_t();
  return Storage(size, storage.nbytes(), std::move(data), owner, owner != nullptr);
}

void set_layout(const Tensor& t, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  auto* implementation = t.unsafeGetTensorImpl();
  implementation->set_storage_offset(offset);
  implementation->set_sizes_and_strides(sizes, strides);
}

// The CPU tensor over the memory of a tensor of this device.
Tensor on_host(const Tensor& t) {
  if (t.storage().nbytes() == 0) {
    return at::empty(t.sizes(), at::device(at::kCPU).dtype(t.dtype()));
  }
  Storage storage = shared_storage(t.storage(), Device(c10::DeviceType::CPU), nullptr);
  const DispatchKeySet keys(c10::DispatchKey::CPU);
  auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, t.dtype());
  set_layout(host, t.storage_offset(), t.sizes(), t.strides());
  if (t.is_conj()) host._set_conj(true);
  if (t.is_neg()) host._set_neg(true);
  return host;
}

// A tensor of this device that is a view of `base`.
Tensor view_of(const Tensor& base, caffe2::TypeMeta dtype, int64_t offset, at::IntArrayRef sizes,
               at::IntArrayRef strides) {
  Storage storage = base.storage();
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, std::move(storage), base.key_set(), dtype);
  set_layout(view, offset, sizes, strides);
  return view;
}

// The tensor of this device over the memory of a CPU tensor. Where that is the memory of one of
// `inputs`, the result is a view of it.
Tensor on_device(const Tensor& host, c10::ArrayRef<Tensor> inputs) {
  if (!host.defined() || host.device().type() != c10::DeviceType::CPU) return host;
  const void* data = host.storage().data();
  for (const auto& input : inputs) {
    if (data && data == input.storage().data()) {
      return view_of(input, host.dtype(), host.storage_offset(), host.sizes(), host.strides());
    }
  }
  Storage storage = shared_storage(host.storage(), the_device(), &allocator);
  const DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  auto t = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, host.dtype());
  set_layout(t, host.storage_offset(), host.sizes(), host.strides());
  return t;
}

// An argument with every tensor of this device replaced by its CPU tensor.
IValue argument_on_host(const IValue& value, std::vector<Tensor>& inputs) {
  auto replaced = [&inputs](const Tensor& t) {
    if (!is_pretend(t)) return t;
    inputs.push_back(t);
    return on_host(t);
  };
  if (value.isTensor()) return replaced(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const auto& t : value.toTensorVector()) list.push_back(replaced(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor> t : value.toOptionalTensorList()) {
      list.push_back(t ? std::optional<Tensor>(replaced(*t)) : t);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().type() == kPretend) {
    return Device(c10::DeviceType::CPU);
  }
  return value;
}

// Refuses what CUDA refuses: a tensor on the CPU beside one of this device. A single number may be
// on the CPU, and so may indices.
void refuse_mixed(const c10::OperatorHandle& op, const std::vector<IValue>& arguments,
                  const std::vector<Tensor>& inputs) {
  const std::string& name = op.schema().name();
  if (inputs.empty() || name == "aten::index" || name == "aten::index_put_" ||
      name == "aten::index_put" || name == "aten::_index_put_impl_") {
    return;
  }
  auto check = [&name](const Tensor& t) {
    TORCH_CHECK(!t.defined() || is_pretend(t) || t.dim() == 0,
                "Expected all tensors to be on the same device, but found at least two devices, "
                "pretend:0 and cpu! (of ", name, ")");
  };
  for (const auto& value : arguments) {
    if (value.isTensor()) check(value.toTensor());
    if (value.isTensorList()) {
      for (const auto& t : value.toTensorVector()) check(t);
    }
  }
}

// Lets an argument that was written to have the memory and the shape of its CPU tensor.
void take_over(const Tensor& t, const Tensor& host) {
  if (host.storage().data() != t.storage().data()) {
    t.unsafeGetTensorImpl()->set_storage_keep_dtype(on_device(host, {}).storage());
  }
  if (host.sizes() != t.sizes() || host.strides() != t.strides()) {
    t.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides());
  }
}

// Runs any operator on the CPU.
void run_on_host(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& parameters = op.schema().arguments();
  const auto& returned = op.schema().returns();
  const auto first = stack->end() - parameters.size();
  const std::vector<IValue> given(first, stack->end());
  stack->erase(first, stack->end());

  std::vector<Tensor> inputs;
  std::vector<IValue> arguments;
  for (const auto& value : given) arguments.push_back(argument_on_host(value, inputs));
  refuse_mixed(op, given, inputs);
  for (const auto& value : arguments) stack->push_back(value);
  op.callBoxed(stack);
  std::vector<IValue> results(stack->end() - returned.size(), stack->end());
  stack->erase(stack->end() - returned.size(), stack->end());

  for (size_t i = 0; i < parameters.size(); i++) {
    const auto* alias = parameters[i].alias_info();
    if (alias && alias->isWrite() && given[i].isTensor() && is_pretend(given[i].toTensor())) {
      take_over(given[i].toTensor(), arguments[i].toTensor());
    }
  }
  for (size_t i = 0; i < returned.size(); i++) {
    const auto* alias = returned[i].alias_info();
    bool is_argument = false;
    if (alias && alias->isWrite() && results[i].isTensor()) {
      for (size_t k = 0; k < parameters.size() && !is_argument; k++) {
        if (parameters[k].alias_info() && *parameters[k].alias_info() == *alias) {
          results[i] = given[k];
          is_argument = true;
        }
      }
    }
    if (is_argument) continue;
    if (results[i].isTensor()) {
      results[i] = on_device(results[i].toTensor(), inputs);
    } else if (results[i].isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& t : results[i].toTensorVector()) list.push_back(on_device(t, inputs));
      results[i] = list;
    }
  }
  for (const auto& value : results) stack->push_back(value);
}

// Operators that make, copy and view tensors

Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout>, std::optional<Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  const DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  const auto type = c10::dtype_or_default(dtype);
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), &allocator, keys, type, format);
}

Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device>, std::optional<bool>) {
  const DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &allocator, keys,
      c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  auto target = is_pretend(to) ? on_host(to) : to;
  target.copy_(is_pretend(from) ? on_host(from) : from);
  return to;
}

at::Scalar number_of(const Tensor& t) { return on_host(t).item(); }

Tensor& set_storage(Tensor& t, Storage storage, int64_t offset, at::IntArrayRef sizes,
                    at::IntArrayRef strides) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  if (strides.size() == sizes.size()) {
    set_layout(t, offset, sizes, strides);
  } else {
    set_layout(t, offset, sizes, at::empty(sizes, at::device(at::kMeta)).strides());
  }
  return t;
}

Tensor& set_whole_storage(Tensor& t, Storage storage) {
  const int64_t size = storage.nbytes() / t.itemsize();
  return set_storage(t, storage, 0, {size}, {});
}

Tensor& set_tensor(Tensor& t, const Tensor& source) {
  return set_storage(t, source.storage(), source.storage_offset(), source.sizes(),
                     source.strides());
}

const Tensor& resize(const Tensor& t, c10::SymIntArrayRef sizes,
                     std::optional<at::MemoryFormat>) {
  const auto fixed = C10_AS_INTARRAYREF_SLOW(sizes);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(fixed);
  const size_t bytes = (t.storage_offset() + t.numel()) * t.itemsize();
  if (bytes > t.storage().nbytes()) resize_storage(t.storage(), bytes);
  return t;
}

Tensor as_strided(const Tensor& t, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                  std::optional<c10::SymInt> offset) {
  const int64_t start = offset ? offset->guard_int(__FILE__, __LINE__) : t.storage_offset();
  return view_of(
      t, t.dtype(), start, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

// torch sends the convolutions of devices like this one through operators of their own.

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                   bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  std::optional<Tensor> host_bias;
  if (bias && bias->defined()) host_bias = on_host(*bias);
  return on_device(at::convolution(on_host(x), on_host(weight), host_bias, stride, padding,
                                   dilation, transposed, output_padding, groups),
                   {});
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  const auto channels = transposed ? weight.size(1) * groups : weight.size(0);
  auto [of_x, of_weight, of_bias] = at::convolution_backward(
      on_host(gradient), on_host(x), on_host(weight), at::IntArrayRef({channels}), stride,
      padding, dilation, transposed, output_padding, groups, wanted);
  return {on_device(of_x, {}), on_device(of_weight, {}), on_device(of_bias, {})};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &number_of);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("resize_", &resize);
  m.impl("as_strided", &as_strided);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  // Composite operators that save what their backward on the CPU needs
  for (const auto* name : {"native_group_norm", "native_layer_norm", "native_group_norm_backward",
                           "native_layer_norm_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}
