/* Which matrix kernels OpenBLAS runs. */
#ifndef VD_OPENBLAS_KERNEL_H
#define VD_OPENBLAS_KERNEL_H

/* Not collective. To be called first thing in main, before MPI starts. OpenBLAS chooses its kernels by processor model
 * while it is loaded, and older ones take AVX2 kernels on a processor with AVX-512 that they do not know (0.3.21 on
 * recent EPYC), at half the speed. Where that happened and OPENBLAS_CORETYPE is not set, it is set to SkylakeX and the
 * program starts itself again. Returns when there is nothing to do, or when starting again failed, in which case the
 * run is only slower. */
void vd_cpu_choose_openblas_kernel(char **argv);

#endif
