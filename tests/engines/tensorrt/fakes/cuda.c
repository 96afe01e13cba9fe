/* A stand-in for libcuda.so.1: memory is host memory, streams do nothing, events read the clock. For rehearsals only. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int R;
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1e3 + t.tv_nsec / 1e6; }
R cuInit(unsigned f) { return f; }
R cuDriverGetVersion(int *v) { *v = 13000; return 0; }
R cuDeviceGetCount(int *n) { const char *none = getenv("NXM_FAKE_NO_GPU"); *n = none ? 0 : 1; return 0; }
R cuDeviceGet(int *d, int i) { *d = i; return i ? 101 : 0; }
R cuDeviceGetName(char *s, int n, int d) { const char *name = getenv("NXM_FAKE_GPU"); strncpy(s, name ? name : "Fake A100", n); return d; }
R cuDeviceTotalMem_v2(size_t *n, int d) { const char *bytes = getenv("NXM_FAKE_MEMORY"); *n = bytes ? strtoull(bytes, 0, 10) : 40000000000ull; return d; }
R cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : 0; return d; }
R cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return d; }
R cuDevicePrimaryCtxRelease_v2(int d) { return d; }
R cuCtxSetCurrent(void *c) { return c ? 0 : 201; }
R cuMemAlloc_v2(unsigned long long *p, size_t n) { *p = (unsigned long long)malloc(n); return *p ? 0 : 2; }
R cuMemFree_v2(unsigned long long p) { free((void *)p); return 0; }
R cuMemcpyHtoDAsync_v2(unsigned long long d, const void *s, size_t n, void *q) { memcpy((void *)d, s, n); return q ? 0 : 400; }
R cuMemcpyDtoHAsync_v2(void *d, unsigned long long s, size_t n, void *q) { memcpy(d, (void *)s, n); return q ? 0 : 400; }
R cuStreamCreate(void **s, unsigned f) { *s = (void *)2; return f == 1 ? 0 : 1; }
R cuStreamSynchronize(void *s) { return s ? 0 : 400; }
R cuStreamDestroy_v2(void *s) { return s ? 0 : 400; }
R cuEventCreate(void **e, unsigned f) { *e = calloc(1, sizeof(double)); return f; }
R cuEventRecord(void *e, void *s) { *(double *)e = now(); return s ? 0 : 400; }
R cuEventSynchronize(void *e) { return e ? 0 : 400; }
R cuEventElapsedTime(float *ms, void *a, void *b) { *ms = (float)(*(double *)b - *(double *)a); return 0; }
R cuEventDestroy_v2(void *e) { free(e); return 0; }

/* A graph holds what TensorRT's stand-in hands over while a stream captures, and does it again when it is launched. */
typedef void (*Work)(void);
struct Graph { Work work[64]; int count; };
static struct Graph *capturing;
int fake_captures(Work w) { if (!capturing) return 0; capturing->work[capturing->count++] = w; return 1; }
R cuStreamBeginCapture_v2(void *s, int mode) { if (!s || mode != 1 || capturing) return 400; capturing = calloc(1, sizeof *capturing); return 0; }
R cuStreamEndCapture(void *s, void **g) {
  if (getenv("NXM_FAKE_NO_CAPTURE")) { free(capturing); capturing = 0; *g = 0; return 901; }
  *g = capturing; capturing = 0; return *g && s ? 0 : 400;
}
R cuGraphInstantiateWithFlags(void **e, void *g, unsigned long long f) { *e = malloc(sizeof(struct Graph)); memcpy(*e, g, sizeof(struct Graph)); return f ? 1 : 0; }
R cuGraphLaunch(void *e, void *s) { struct Graph *g = e; for (int i = 0; i < g->count; i++) g->work[i](); return s && g->count ? 0 : 400; }
R cuGraphDestroy(void *g) { free(g); return 0; }
R cuGraphExecDestroy(void *e) { free(e); return 0; }
R cuGetErrorString(R code, const char **s) { *s = code == 2 ? "out of memory" : "fake error"; return 0; }
