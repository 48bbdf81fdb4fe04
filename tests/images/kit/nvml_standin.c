/* Stands in for NVIDIA's libnvidia-ml.so.1 where no card is: answers from facts.h, which is made of a recording.
 * Names, argument orders and codes: NVML API reference, nvml.h. What it does not know it does not support. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6 };

struct device {
  const char *name, *uuid;
  unsigned long long total_mib, used_mib;
  unsigned multiprocessors, gpu_instance, compute_instance;
};
typedef const struct device *handle;
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci;
typedef struct {
  unsigned multiprocessors, copy_engines, decoders, encoders, jpeg, ofa, gpu_slices, compute_slices;
  unsigned long long memory_mib;
} attributes;

/* devices[0] is the card, the others are its slices. */
#include "facts.h"
#define SLICES (sizeof devices / sizeof *devices - 1)

static int text(char *to, unsigned length, const char *from) {
  snprintf(to, length, "%s", from);
  return SUCCESS;
}
static int number(unsigned *to, unsigned from) {
  *to = from;
  return SUCCESS;
}
static int card(handle at) { return at == devices; }

int nvmlInitWithFlags(unsigned flags) {
  int file = open("/dev/nvidiactl", O_RDWR); /* where the test makes it, its rights count */
  if (file < 0 && errno == EACCES) return NO_PERMISSION;
  if (file >= 0) close(file);
  return flags ? INVALID_ARGUMENT : SUCCESS;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) {
  return code == NOT_SUPPORTED ? "Not Supported" : code == NO_PERMISSION ? "Insufficient Permissions" : "Error";
}
int nvmlSystemGetDriverVersion(char *to, unsigned length) { return text(to, length, DRIVER); }
int nvmlSystemGetCudaDriverVersion_v2(int *to) { return *to = CUDA, SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *to) { return number(to, 1); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, handle *to) {
  return index ? INVALID_ARGUMENT : (*to = devices, SUCCESS);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, handle *to) {
  for (unsigned place = 0; place <= SLICES; place++)
    if (!strcmp(devices[place].uuid, uuid)) return *to = devices + place, SUCCESS;
  return NOT_FOUND;
}
int nvmlDeviceGetIndex(handle at, unsigned *to) { return number(to, at > devices ? at - devices - 1 : 0); }
int nvmlDeviceGetName(handle at, char *to, unsigned length) { return text(to, length, at->name); }
int nvmlDeviceGetUUID(handle at, char *to, unsigned length) { return text(to, length, at->uuid); }
int nvmlDeviceGetMemoryInfo(handle at, memory *to) {
  to->total = at->total_mib << 20;
  to->used = at->used_mib << 20;
  return to->free = to->total - to->used, SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(handle at, int *major, int *minor) {
  return *major = CAPABILITY_MAJOR, *minor = CAPABILITY_MINOR, at ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetArchitecture(handle at, unsigned *to) { return at ? number(to, ARCHITECTURE) : INVALID_ARGUMENT; }
int nvmlDeviceGetPciInfo_v3(handle at, pci *to) {
  memset(to, 0, sizeof *to);
  return card(at) ? text(to->bus_id, sizeof to->bus_id, BUS) : NOT_SUPPORTED;
}
int nvmlDeviceGetMigMode(handle at, unsigned *now, unsigned *then) {
  return card(at) ? (number(then, MIG), number(now, MIG)) : NOT_SUPPORTED;
}
int nvmlDeviceGetEccMode(handle at, unsigned *now, unsigned *then) {
  return card(at) ? (number(then, ECC), number(now, ECC)) : NOT_SUPPORTED;
}
int nvmlDeviceGetPersistenceMode(handle at, unsigned *to) { return card(at) ? number(to, PERSISTENCE) : NOT_SUPPORTED; }
int nvmlDeviceGetEnforcedPowerLimit(handle at, unsigned *to) { return card(at) ? number(to, LIMIT_MW) : NOT_SUPPORTED; }
int nvmlDeviceGetPowerUsage(handle at, unsigned *to) { return card(at) ? number(to, POWER_MW) : NOT_SUPPORTED; }
int nvmlDeviceGetTemperature(handle at, int sensor, unsigned *to) {
  return sensor || !card(at) ? NOT_SUPPORTED : number(to, CELSIUS);
}
int nvmlDeviceGetMaxMigDeviceCount(handle at, unsigned *to) { return card(at) ? number(to, 7) : NOT_SUPPORTED; }
int nvmlDeviceGetMigDeviceHandleByIndex(handle at, unsigned index, handle *to) {
  return card(at) && index < SLICES ? (*to = devices + 1 + index, SUCCESS) : NOT_FOUND;
}
int nvmlDeviceGetAttributes_v2(handle at, attributes *to) {
  if (card(at)) return NOT_SUPPORTED;
  memset(to, 0, sizeof *to);
  to->memory_mib = at->total_mib;
  return number(&to->multiprocessors, at->multiprocessors);
}
int nvmlDeviceGetGpuInstanceId(handle at, unsigned *to) { return card(at) ? NOT_SUPPORTED : number(to, at->gpu_instance); }
int nvmlDeviceGetComputeInstanceId(handle at, unsigned *to) {
  return card(at) ? NOT_SUPPORTED : number(to, at->compute_instance);
}
int nvmlDeviceGetNvLinkState(handle at, unsigned link, unsigned *to) { return NOT_SUPPORTED; }
int nvmlDeviceGetUtilizationRates(handle at, void *to) { return NOT_SUPPORTED; }
int nvmlDeviceGetTotalEnergyConsumption(handle at, unsigned long long *to) { return NOT_SUPPORTED; }
