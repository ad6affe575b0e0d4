/* The floating-point type of parameters and of the CPU backend's arithmetic. The same sources are compiled twice:
 * in float, which ships, and in double (VD_DOUBLE), which the golden and finite-difference tests link. */
#ifndef VD_REAL_H
#define VD_REAL_H

#ifdef VD_DOUBLE
typedef double real;
#define VD_REAL_IS_DOUBLE 1
#else
typedef float real;
#define VD_REAL_IS_DOUBLE 0
#endif

#endif
