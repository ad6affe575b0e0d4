"""Viaduct for Spack. In a repository of your own:

    spack repo create ~/spack-viaduct viaduct && spack repo add ~/spack-viaduct
    mkdir -p ~/spack-viaduct/packages/viaduct && cp jobs/spack/package.py ~/spack-viaduct/packages/viaduct/
    spack dev-build --source-path=$PWD viaduct@0.1.0      # builds this source tree; add +cuda for GPUs

Written for Spack 0.22; later versions want packages under spack_repo/viaduct/packages.
"""
from spack.package import *


class Viaduct(MakefilePackage):
    """Trains adaptive-span transformers and Transformer-XL on byte-level text, as an MPI program: namelist decks in,
    HDF5 files out."""

    maintainers = []
    license("MIT")

    version("0.1.0")

    variant("arch", default="native", values=str, multi=False,
            description="-march of the C compiler; name the oldest processor where nodes differ")
    variant("cuda", default=False, description="Build the CUDA part, for GPUs of compute capability 9.0")

    depends_on("c", type="build")
    depends_on("cxx", type="build", when="+cuda")
    depends_on("gmake", type="build")
    depends_on("pkgconfig", type="build")
    depends_on("mpi")
    depends_on("hdf5+hl")
    depends_on("openblas threads=openmp")
    depends_on("libarchive")
    depends_on("zlib-api")
    depends_on("nettle")
    depends_on("jansson")
    depends_on("random123", type="build")
    depends_on("cuda@12:", when="+cuda")
    depends_on("nccl@2.14:", when="+cuda", type="run")

    def variables(self):
        spec = self.spec
        roots = {"HDF5": "hdf5", "OPENBLAS": "openblas", "LIBARCHIVE": "libarchive", "ZLIB": "zlib-api", "NETTLE": "nettle",
                 "JANSSON": "jansson", "RANDOM123": "random123"}
        words = [f"{name}_ROOT={spec[package].prefix}" for name, package in roots.items()]
        words += [f"CC={spec['mpi'].mpicc}", f"ARCH={spec.variants['arch'].value}",
                  f"PREFIX={self.prefix}", "DEPS=no"]
        words += [f"CUDA_HOME={spec['cuda'].prefix}", "CUDA=yes"] if spec.satisfies("+cuda") else ["CUDA=no"]
        return words

    def build(self, spec, prefix):
        make(*self.variables(), "all")

    def install(self, spec, prefix):
        make(*self.variables(), "install")

    def setup_run_environment(self, env):
        if self.spec.satisfies("+cuda"):  # the program loads NCCL at run time
            env.prepend_path("LD_LIBRARY_PATH", self.spec["nccl"].prefix.lib)
