/* libcuda.so.1 for a machine without a GPU, as far as Triton calls it: it loads cubins, encodes tensor maps and takes
   launches by the rules of the driver API's documentation, computes nothing, and keeps the parameters of the last launch
   as the cubin lays them out. `fake_...` are for the tests. */
#include "cuda.h"
#include <elf.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MOST_PARAMS 64
#define NOT_KEPT 16384

enum { FORMAT_SIZED = 4, ATTR_KPARAM = 0x17, ATTR_MAX_THREADS = 0x05, ATTR_REQUIRED = 0x10 };

typedef struct { char *image; size_t size; } Module;
typedef struct {
  int magic, params, offset[MOST_PARAMS], size[MOST_PARAMS], max_threads, required, shared;
  char name[256];
} Function;

static int cc, sms, shared_optin, context;
static char why[1024] = "";
static unsigned char kept[NOT_KEPT];
static int kept_params, kept_offset[MOST_PARAMS], kept_bytes, early, grid[3], block;
static char kept_name[256];

static CUresult refuse(CUresult code, const char *format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(why, sizeof why, format, list);
  va_end(list);
  return code;
}

EXPORT void fake_device(int capability, int multiprocessors, int shared) {
  cc = capability, sms = multiprocessors, shared_optin = shared;
}
EXPORT const char *fake_why(void) { return why; }
EXPORT int fake_early(void) { return early; }
EXPORT const char *fake_last_name(void) { return kept_name; }
EXPORT int fake_offset(int i) { return i < kept_params ? kept_offset[i] : -1; }
EXPORT int fake_last(unsigned char *to, int *dims) {
  memcpy(to, kept, kept_bytes);
  memcpy(dims, grid, sizeof grid), dims[3] = block;
  return kept_bytes;
}

EXPORT CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = code == CUDA_SUCCESS ? "no error" : why;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult code, const char **text) { return cuGetErrorString(code, text); }
EXPORT CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return *status = 0, CUDA_SUCCESS; }
EXPORT CUresult cuInit(unsigned flags) { return flags ? refuse(CUDA_ERROR_INVALID_VALUE, "flags") : CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice *device, int number) {
  *device = number;
  return number ? refuse(CUDA_ERROR_INVALID_DEVICE, "device %d", number) : CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  switch (which) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_optin; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_optin + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = sms; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = cc / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = cc % 10; break;
  default: *value = 1000;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext *current) { return *current = (CUcontext)&context, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *current, CUdevice device) { return cuCtxGetCurrent(current); }
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) || header->e_machine != EM_CUDA)
    return refuse(CUDA_ERROR_INVALID_IMAGE, "no cubin");
  Module *made = malloc(sizeof *made);
  made->size = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  if (header->e_phoff > made->size) made->size = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
  made->image = malloc(made->size);
  memcpy(made->image, image, made->size);
  *module = (CUmodule)made;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  const Module *from = (const Module *)module;
  const Elf64_Ehdr *header = (const void *)from->image;
  const Elf64_Shdr *sections = (const void *)(from->image + header->e_shoff);
  const char *names = from->image + sections[header->e_shstrndx].sh_offset;
  char info[300], code[300];
  snprintf(info, sizeof info, ".nv.info.%s", name), snprintf(code, sizeof code, ".text.%s", name);
  Function *made = calloc(1, sizeof *made);
  made->magic = 0xf00d, made->max_threads = 1024, made->shared = 49152;
  snprintf(made->name, sizeof made->name, "%s", name);
  int found = 0;
  for (int i = 0; i < header->e_shnum; ++i) {
    const char *is = names + sections[i].sh_name;
    found |= !strcmp(is, code);
    if (strcmp(is, info)) continue;
    const unsigned char *at = (const void *)(from->image + sections[i].sh_offset), *end = at + sections[i].sh_size;
    while (at + 4 <= end) {
      int format = at[0], attribute = at[1], size = format == FORMAT_SIZED ? at[2] | at[3] << 8 : 0;
      const unsigned char *body = at + 4;
      if (format == FORMAT_SIZED && attribute == ATTR_KPARAM) {
        int ordinal = body[4] | body[5] << 8;
        unsigned word;
        memcpy(&word, body + 8, 4);
        if (ordinal >= MOST_PARAMS) return refuse(CUDA_ERROR_NOT_SUPPORTED, "parameter %d", ordinal);
        made->offset[ordinal] = body[6] | body[7] << 8, made->size[ordinal] = word >> 18;
        if (ordinal >= made->params) made->params = ordinal + 1;
      } else if (format == FORMAT_SIZED && (attribute == ATTR_MAX_THREADS || attribute == ATTR_REQUIRED)) {
        unsigned x;
        memcpy(&x, body, 4);
        if (attribute == ATTR_REQUIRED) made->required = x;
        made->max_threads = x;
      }
      at = body + size;
    }
  }
  if (!found) return refuse(CUDA_ERROR_NOT_FOUND, "no kernel %s in the cubin", name);
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? ((Function *)function)->max_threads
           : which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 128
                                                            : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > shared_optin) return refuse(CUDA_ERROR_INVALID_VALUE, "%d bytes of shared memory", value);
    ((Function *)function)->shared = value;
  } else if (which > 15)
    return refuse(CUDA_ERROR_INVALID_VALUE, "attribute %d of a function", which);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction function, const CUlaunchConfig *config) {
  return *n = sms, CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

/* The rules of the documentation of cuTensorMapEncodeTiled, without interleave. */
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                       const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
  static const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const int span[] = {1 << 30, 32, 64, 128, 128, 128, 128};
  if ((uintptr_t)map % 64) return refuse(CUDA_ERROR_INVALID_VALUE, "the map is not on 64 bytes");
  if (type < 0 || type > 12) return refuse(CUDA_ERROR_INVALID_VALUE, "data type %d", type);
  if (rank < 1 || rank > 5) return refuse(CUDA_ERROR_INVALID_VALUE, "rank %u", rank);
  if ((uintptr_t)address % 16) return refuse(CUDA_ERROR_INVALID_VALUE, "address %p is not on 16 bytes", address);
  if (swizzle < 0 || swizzle > 6) return refuse(CUDA_ERROR_INVALID_VALUE, "swizzle %d", swizzle);
  for (unsigned i = 0; i < rank; ++i) {
    if (!dims[i] || dims[i] > 1ull << 32) return refuse(CUDA_ERROR_INVALID_VALUE, "dimension %u of %llu", i, (unsigned long long)dims[i]);
    if (!box[i] || box[i] > 256) return refuse(CUDA_ERROR_INVALID_VALUE, "a box of %u along dimension %u", box[i], i);
    if (!steps[i] || steps[i] > 8) return refuse(CUDA_ERROR_INVALID_VALUE, "a step of %u", steps[i]);
    if (i + 1 < rank) {
      if (strides[i] % 16 || strides[i] >= 1ull << 40) return refuse(CUDA_ERROR_INVALID_VALUE, "a stride of %llu bytes", (unsigned long long)strides[i]);
      if (strides[i] < dims[i] * (i ? strides[i - 1] : bytes[type])) return refuse(CUDA_ERROR_INVALID_VALUE, "a stride of %llu bytes is less than what it steps over", (unsigned long long)strides[i]);
    }
  }
  unsigned inner = box[0] * bytes[type];
  if (inner % 16) return refuse(CUDA_ERROR_INVALID_VALUE, "a box of %u bytes", inner);
  if (inner > span[swizzle]) return refuse(CUDA_ERROR_INVALID_VALUE, "a box of %u bytes, more than swizzle %d has", inner, swizzle);
  if (fill && (type < 6)) return refuse(CUDA_ERROR_INVALID_VALUE, "NaN for integers");
  memset(map, 0, sizeof *map);
  ((cuuint64_t *)map)[0] = (cuuint64_t)address;
  ((cuuint64_t *)map)[1] = dims[0], ((cuuint64_t *)map)[2] = rank > 1 ? dims[1] : 0;
  ((cuuint64_t *)map)[3] = rank > 1 ? strides[0] : 0;
  ((cuuint64_t *)map)[4] = box[0] | (cuuint64_t)(rank > 1 ? box[1] : 0) << 32;
  ((cuuint64_t *)map)[5] = swizzle | (cuuint64_t)type << 32;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  const Function *is = (const Function *)function;
  if (!is || is->magic != 0xf00d) return refuse(CUDA_ERROR_INVALID_HANDLE, "no function");
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ || config->gridDimX > 0x7fffffffu ||
      config->gridDimY > 65535 || config->gridDimZ > 65535)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: a grid of %u x %u x %u", is->name, config->gridDimX, config->gridDimY, config->gridDimZ);
  if (config->blockDimX > is->max_threads || (is->required && config->blockDimX != is->required))
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u threads of %d", is->name, config->blockDimX, is->max_threads);
  if (config->sharedMemBytes > is->shared)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u bytes of shared memory, %d allowed", is->name, config->sharedMemBytes, is->shared);
  early = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
      if (cc < 90) return refuse(CUDA_ERROR_NOT_SUPPORTED, "%s: an early launch on sm_%d", is->name, cc);
      early = 1;
    } else if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION && cc < 90)
      return refuse(CUDA_ERROR_NOT_SUPPORTED, "%s: clusters on sm_%d", is->name, cc);
  }
  kept_bytes = 0, kept_params = is->params, memcpy(kept_offset, is->offset, sizeof kept_offset);
  for (int i = 0; i < is->params; ++i) {
    if (is->offset[i] + is->size[i] > NOT_KEPT) return refuse(CUDA_ERROR_INVALID_VALUE, "%s: parameters", is->name);
    if (((uintptr_t)params[i]) % (is->size[i] >= 128 ? 64 : is->size[i] & -is->size[i])) return refuse(CUDA_ERROR_INVALID_VALUE, "%s: parameter %d is misaligned", is->name, i);
    memcpy(kept + is->offset[i], params[i], is->size[i]);
    if (is->offset[i] + is->size[i] > kept_bytes) kept_bytes = is->offset[i] + is->size[i];
  }
  grid[0] = config->gridDimX, grid[1] = config->gridDimY, grid[2] = config->gridDimZ, block = config->blockDimX;
  strcpy(kept_name, is->name);
  return CUDA_SUCCESS;
}
