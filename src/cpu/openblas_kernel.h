/* Which matrix kernels OpenBLAS runs. */
#ifndef VD_OPENBLAS_KERNEL_H
#define VD_OPENBLAS_KERNEL_H

#include <stdbool.h>

/* Not collective. The kernel that OpenBLAS should run instead of `chosen` (as openblas_get_corename spells it) on a
 * processor with these instructions; NULL where the chosen one uses them. */
const char *vd_cpu_wider_openblas_kernel(const char *chosen, bool avx512, bool avx2);

/* Not collective. To be called first thing in main, before MPI starts. OpenBLAS chooses its kernels by processor model
 * while it is loaded. For models that it does not know it takes kernels of older ones: 0.3.21 those with AVX2 on recent
 * EPYCs with AVX-512, at half the speed, and those with SSE3 on recent Xeons, slower still. Where that happened and
 * OPENBLAS_CORETYPE is not set, it is set and the program starts itself again. Returns when there is nothing to do, or
 * when starting again failed, in which case the run is only slower. */
void vd_cpu_choose_openblas_kernel(char **argv);

#endif
