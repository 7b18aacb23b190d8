/* Which instruction sets this CPU has, and which of them is in use. */
#include "call.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

enum { VERSION = 6, NUM_LEVELS = 5 };

static kernel_table tables[NUM_LEVELS];
static int num_levels;
const kernel_table *isthmus_kernels;

#if defined(__x86_64__)
static uint64_t enabled_states(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* AMX state is off for a process until it asks. */
static int may_use_tiles(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

static int count_levels(void) {
    uint32_t a, b, c, d, b7, c7, d7, a71 = 0, unused;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 1;
    int has_fma = c >> 12 & 1, has_xsave = c >> 27 & 1, has_f16c = c >> 29 & 1;
    if (!has_xsave || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 1;
    __get_cpuid_count(7, 1, &a71, &unused, &unused, &unused);
    uint64_t states = enabled_states();
    int has_avx2 = has_fma && has_f16c && b7 >> 5 & 1 && (states & 0x6) == 0x6;
    const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31; /* f dq cd bw vl */
    int has_avx512 = has_avx2 && (b7 & avx512) == avx512 && (states & 0xe6) == 0xe6;
    int has_bf16 = has_avx512 && a71 >> 5 & 1;
    int has_amx = has_bf16 && (d7 >> 22 & 5) == 5 /* amx-bf16 and amx-tile */ &&
                  (states & 0x60000) == 0x60000 && may_use_tiles();
    return has_amx ? 5 : has_bf16 ? 4 : has_avx512 ? 3 : has_avx2 ? 2 : 1;
}
#else
static int count_levels(void) { return 1; }
#endif

__attribute__((constructor)) static void detect(void) {
    num_levels = count_levels();
    for (int level = 0; level < num_levels; ++level) {
        kernel_table *table = &tables[level];
        table->name = "portable";
        isthmus_fill_portable(table);
#if defined(__x86_64__)
        if (level >= 1) table->name = "avx2", isthmus_fill_avx2(table);
        if (level >= 2) table->name = "avx512", isthmus_fill_avx512(table);
        if (level >= 3) {
            table->name = "avx512-bf16";
            isthmus_fill_avx512_bf16(table);
            isthmus_fill_dot(table);
        }
        if (level >= 4) {
            table->name = "amx-bf16";
            isthmus_fill_amx_linear(table);
            isthmus_fill_amx_attention(table);
        }
#endif
    }
    isthmus_kernels = &tables[num_levels - 1];
}

EXPORT int isthmus_version(void) { return VERSION; }
EXPORT int isthmus_num_levels(void) { return num_levels; }
EXPORT const char *isthmus_level_name(int level) {
    return level >= 0 && level < num_levels ? tables[level].name : "";
}
/* For tests: packed weights fit every level. */
EXPORT int isthmus_use_level(int level) {
    if (level < 0 || level >= num_levels) return -1;
    isthmus_kernels = &tables[level];
    return 0;
}
