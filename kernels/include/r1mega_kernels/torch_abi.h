// The part of torch's stable C ABI (torch >= 2.10) that the operators need, declared here instead of included: the
// libraries then build where torch is not installed yet (an isolated `pip install`), in seconds, and one file serves
// every Python and torch version. tests/unit/kernels/test_build.py compiles these declarations against torch's own
// headers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#if !defined(R1_TORCH_HEADERS)
struct AtenTensorOpaque;
struct TorchLibraryOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;
#endif

extern "C" {
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* numel);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_float32();
AOTITorchError aoti_torch_library_init_impl(const char* name_space, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle* library);
AOTITorchError aoti_torch_library_impl(TorchLibraryHandle library, const char* name,
                                       void (*function)(StableIValue*, uint64_t, uint64_t));
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*function)(int64_t, int64_t, void*),
                                  void* context);
// Absent from a torch without CUDA, hence weak.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));
}

#if defined(R1_SIGNATURE)  // of the operators that the library was built for (build.py); library.py compares it
extern "C" __attribute__((visibility("default"))) uint32_t r1mega_kernels_signature() { return R1_SIGNATURE; }
#endif

namespace r1mega::abi {

inline void check(AOTITorchError error, const char* what) {
    if (error != 0) throw std::runtime_error(std::string("r1mega_kernels: torch reports an error in ") + what);
}

// Owns one argument of an operator; a boxed operator must release its tensors.
class Tensor {
  public:
    explicit Tensor(StableIValue value) { memcpy(&handle_, &value, sizeof handle_); }
    ~Tensor() { aoti_torch_delete_tensor_object(handle_); }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;

    template <class E>
    E* data() const {
        void* pointer = nullptr;
        check(aoti_torch_get_data_ptr(handle_, &pointer), "get_data_ptr");
        return static_cast<E*>(pointer);
    }
    // nullptr stands for an optional tensor that was not given: it comes as one without elements
    template <class E>
    E* data_or_null() const {
        return numel() == 0 ? nullptr : data<E>();
    }
    int64_t numel() const {
        int64_t count = 0;
        check(aoti_torch_get_numel(handle_, &count), "get_numel");
        return count;
    }
    int64_t size(int dim) const {
        int64_t* sizes = nullptr;
        check(aoti_torch_get_sizes(handle_, &sizes), "get_sizes");
        return sizes[dim];
    }
    int64_t stride(int dim) const {
        int64_t* strides = nullptr;
        check(aoti_torch_get_strides(handle_, &strides), "get_strides");
        return strides[dim];
    }
    int32_t dtype() const {
        int32_t dtype = 0;
        check(aoti_torch_get_dtype(handle_, &dtype), "get_dtype");
        return dtype;
    }
    bool is_bf16() const { return dtype() == aoti_torch_dtype_bfloat16(); }
    bool is_fp32() const { return dtype() == aoti_torch_dtype_float32(); }
    bool is_fp16() const { return dtype() == aoti_torch_dtype_float16(); }
    // Room for `least` floats that an operator writes; an error where it is less, or of another type.
    float* room_for_floats(int64_t least) const {
        if (!is_fp32() || numel() < least)
            throw std::runtime_error("r1mega_kernels: the scratch must have " + std::to_string(least) +
                                     " elements of float32");
        return data<float>();
    }
    int32_t device_index() const {
        int32_t index = 0;
        check(aoti_torch_get_device_index(handle_, &index), "get_device_index");
        return index;
    }

  private:
    AtenTensorHandle handle_;
};

template <class T>
T scalar(StableIValue value) {
    T result;
    memcpy(&result, &value, sizeof result);
    return result;
}

// Registers implementations of operators that ops.py has declared.
class Registration {
  public:
    Registration(const char* key, const char* file) {
        check(aoti_torch_library_init_impl("r1mega_kernels", key, file, 0, &library_), "library_init_impl");
    }
    Registration& add(const char* name, void (*function)(StableIValue*, uint64_t, uint64_t)) {
        check(aoti_torch_library_impl(library_, name, function), name);
        return *this;
    }

  private:
    TorchLibraryHandle library_ = nullptr;  // lives as long as the process, as the loaded library does
};

}  // namespace r1mega::abi
