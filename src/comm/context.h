/* The context of a command: its communicator and the lock of the HDF5 library. */
#ifndef VD_CONTEXT_H
#define VD_CONTEXT_H

#include "io/h5.h"

#include <mpi.h>
#include <stdbool.h>

typedef struct vd_context {
  MPI_Comm comm; /* all ranks of the run; not MPI_COMM_WORLD itself but a duplicate */
  int rank, size;
  vd_h5 *h5;       /* lock of the HDF5 library, shared with reader threads */
  bool check_only; /* --check: write nothing */
} vd_context;

#endif
