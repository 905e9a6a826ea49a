/* Memory that is written for the first time: the system hands it out page by page, and in small pages that costs as much
 * as the scan itself. Where it is asked to, it uses pages of 2 MiB. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>

#include "lightnets.h"

enum { HUGE_PAGE = 2 << 20 };

/* Asks for huge pages in the whole ones of `bytes` from `start`; a hint, which changes no contents. */
LN_PUBLIC void ln_use_huge_pages(void *start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t first = ((uintptr_t)start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t end = ((uintptr_t)start + (uintptr_t)bytes) / HUGE_PAGE * HUGE_PAGE;
    if (bytes >= HUGE_PAGE && end > first) (void)madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

/* For scratch that may be large; NULL if there is no memory. To be given back by free. */
void *ln_allocate(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, bytes >= HUGE_PAGE ? HUGE_PAGE : 64, bytes ? bytes : 1)) return NULL;
    ln_use_huge_pages(memory, (int64_t)bytes);
    return memory;
}
