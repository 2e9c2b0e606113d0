// Let a CPU build of PyTorch believe in one CUDA device, as far as autograd and autocast ask for it.
// Tensors of that device are fake (tests/fake_cuda/mode.py): nothing here allocates or computes.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceType kCuda = c10::DeviceType::CUDA;
const c10::Device the_device(kCuda, 0);
const c10::Stream the_stream(c10::Stream::DEFAULT, the_device);

// Autograd asks for the current device and stream, and orders streams by events: one stream needs no order.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCuda; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return the_device; }
  c10::Device exchangeDevice(c10::Device) const override { return the_device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return the_stream; }
  c10::Stream getDefaultStream(c10::Device) const override { return the_stream; }
  c10::Stream exchangeStream(c10::Stream) const override { return the_stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

// The choice of kernels (cuDNN or not) and generators go through these.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  long versionCuDNN() const override { return 91500; }
  long versionRuntimeCuDNN() const override { return 91500; }
  double batchnormMinEpsilonCuDNN() const override { return 1e-5; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
};

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)  // PyTorch looks for a class of this name
}

// Return 1 if the guard is in place now, 0 if this build of PyTorch has a real one.
extern "C" int install_fake_cuda() {
  auto& place = c10::impl::device_guard_impl_registry[static_cast<size_t>(kCuda)];
  if (place.load() != nullptr) return 0;
  place.store(new Guard());
  return 1;
}
