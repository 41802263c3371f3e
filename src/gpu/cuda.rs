//! Launches on CUDA. NVRTC compiles `label_smoothing.cu` for the device's architecture when a variant is first
//! used. The result and the handle of each kernel are kept.

use super::kernel::{Buffer, GpuStorage, Grid, KernelKey, KernelVariant, Limits};
use crate::gpu_compile::{Cache, cached};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, Ptx, compile_ptx_with_opts};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Result, Storage};
use std::sync::{Arc, LazyLock};

const SOURCE: &str = include_str!("label_smoothing.cu");

/// Evaluates an expression on the slice in a storage, whatever its type.
macro_rules! with_slice {
    ($storage:expr, $slice:ident => $value:expr) => {
        match $storage {
            CudaStorageSlice::U8($slice) => $value,
            CudaStorageSlice::U32($slice) => $value,
            CudaStorageSlice::I16($slice) => $value,
            CudaStorageSlice::I32($slice) => $value,
            CudaStorageSlice::I64($slice) => $value,
            CudaStorageSlice::BF16($slice) => $value,
            CudaStorageSlice::F16($slice) => $value,
            CudaStorageSlice::F32($slice) => $value,
            CudaStorageSlice::F64($slice) => $value,
            CudaStorageSlice::F8E4M3($slice) => $value,
            CudaStorageSlice::F6E2M3($slice)
            | CudaStorageSlice::F6E3M2($slice)
            | CudaStorageSlice::F4($slice)
            | CudaStorageSlice::F8E8M0($slice) => $value,
        }
    };
}

impl GpuStorage for CudaStorage {
    /// All devices have these limits.
    fn limits(_: &CudaDevice, _: KernelKey) -> Result<Limits> {
        Ok(Limits { max_blocks: i32::MAX as usize, max_threads: 1024, warp_size: 32 })
    }

    fn len(&self) -> usize {
        with_slice!(&self.slice, slice => slice.len())
    }

    fn from_storage(storage: &Storage) -> Option<&Self> {
        match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        }
    }

    unsafe fn launch<P: Copy>(
        device: &CudaDevice,
        kernel: KernelKey,
        grid: Grid,
        buffers: &mut [Buffer<Self>],
        params: &P,
    ) -> Result<()> {
        let stream = device.cuda_stream();
        let function = load_function(stream.context(), kernel)?;
        let mut launch = stream.launch_builder(&function);
        for buffer in buffers {
            match buffer {
                Buffer::Input(storage) => with_slice!(&storage.slice, slice => launch.arg(slice)),
                Buffer::Output(storage) => {
                    with_slice!(&mut storage.slice, slice => launch.arg(slice))
                }
                Buffer::Unused => launch.arg(&NULL),
            };
        }
        let params = ByValue(*params);
        launch.arg(&params);
        let config = LaunchConfig {
            grid_dim: (grid.blocks as u32, 1, 1),
            block_dim: (grid.threads_per_block as u32, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the caller vouches for the arguments.
        unsafe { launch.launch(config) }.w()?;
        Ok(())
    }
}

/// A null pointer, as an argument.
const NULL: u64 = 0;

/// A struct that a kernel takes by value.
#[repr(transparent)]
struct ByValue<P>(P);

// SAFETY: the driver copies as many bytes as the kernel's parameter has. The caller of `launch` vouches that
// the parameter is the same struct.
unsafe impl<P: Copy> DeviceRepr for ByValue<P> {}

/// The address of a context. All devices of a GPU use its primary context, whatever their streams. A context from which a
/// module is kept stays until the process ends, so no other context gets its address.
fn address(context: &CudaContext) -> usize {
    context.cu_ctx().addr()
}

/// The handle of a kernel in a context, for all streams of the context.
fn load_function(context: &Arc<CudaContext>, kernel: KernelKey) -> Result<CudaFunction> {
    static FUNCTIONS: LazyLock<Cache<(usize, KernelKey), CudaFunction>> =
        LazyLock::new(Cache::default);

    cached(&FUNCTIONS, (address(context), kernel), || {
        let module = load_module(context, kernel.variant)?;
        // The context need not be current: another thread may have loaded the module.
        context.bind_to_thread().w()?;
        module.load_function(kernel.name).w()
    })
}

/// The compiled source in a context. The driver translates it for the GPU.
fn load_module(context: &Arc<CudaContext>, variant: KernelVariant) -> Result<Arc<CudaModule>> {
    static MODULES: LazyLock<Cache<(usize, KernelVariant), Arc<CudaModule>>> =
        LazyLock::new(Cache::default);

    cached(&MODULES, (address(context), variant), || {
        let (major, minor) = context.compute_capability().w()?;
        context.load_module(compile(10 * major + minor, variant)?).w()
    })
}

/// Compiles the source for an architecture. The GPUs of a process may have different architectures.
fn compile(architecture: i32, variant: KernelVariant) -> Result<Ptx> {
    static PTX: LazyLock<Cache<(i32, KernelVariant), Ptx>> = LazyLock::new(Cache::default);

    cached(&PTX, (architecture, variant), || {
        let options = CompileOptions {
            name: Some("label_smoothing.cu".to_string()),
            options: vec![
                format!("--gpu-architecture=compute_{architecture}"),
                "--std=c++17".to_string(),
            ],
            ..CompileOptions::default()
        };
        let source = format!("{}{SOURCE}", variant.definitions()?);
        compile_ptx_with_opts(source, options).w()
    })
}
