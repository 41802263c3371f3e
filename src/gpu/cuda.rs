//! Launches on CUDA. NVRTC compiles the kernels for the device's architecture when a variant is first used. The result and the
//! handle of each kernel are kept.

use super::kernel::{
    Buffer, GpuStorage, Grid, KernelKey, KernelVariant, Limits, SCRATCH_BYTES, source,
};
use crate::gpu_compile::{Cache, cached, choose_architecture};
use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute, CUresult};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, DeviceRepr, DriverError, LaunchConfig,
    PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, Ptx, compile_ptx_with_opts, sys};
use candle_core::cuda_backend::{CudaError, CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Error, Result, Storage};
use std::cell::RefCell;
use std::sync::{Arc, LazyLock};

/// The number of blocks that a multiprocessor has room for: `MIN_BLOCKS` in the kernel source, for f32.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;

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
    fn limits(device: &CudaDevice, _: KernelKey) -> Result<Limits> {
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = device.cuda_stream().context().attribute(count).w()?;
        Ok(Limits {
            max_blocks: i32::MAX as usize,
            target_blocks: BLOCKS_PER_MULTIPROCESSOR * multiprocessors.max(1) as usize,
            max_threads: 1024,
            warp_size: 32,
            joins_blocks: true,
        })
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
        let mut scratch = match buffers.iter().any(|buffer| matches!(buffer, Buffer::Scratch)) {
            true => Some(Scratch::take(device)?),
            false => None,
        };
        let mut scratch_slice = scratch.as_mut().map(|scratch| &mut scratch.slice);
        let mut launch = stream.launch_builder(&function);
        for buffer in buffers {
            match buffer {
                Buffer::Input(storage) => with_slice!(&storage.slice, slice => launch.arg(slice)),
                Buffer::Output(storage) => {
                    with_slice!(&mut storage.slice, slice => launch.arg(slice))
                }
                Buffer::Scratch => match scratch_slice.take() {
                    Some(slice) => launch.arg(slice),
                    None => launch.arg(&NULL),
                },
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
        if let Some(scratch) = scratch {
            scratch.keep();
        }
        Ok(())
    }
}

/// The memory of [`Buffer::Scratch`]. Each thread has its own for each stream that it launches on, because the device of candle's
/// `Device::new_cuda` has a stream for each thread. It is freed when the thread ends. A launch that
/// fails does not keep it.
struct Scratch {
    stream: (usize, usize),
    slice: CudaSlice<u64>,
}

thread_local! {
    static SCRATCHES: RefCell<Vec<Scratch>> = const { RefCell::new(Vec::new()) };
}

impl Scratch {
    fn take(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let stream = (address(stream.context()), stream.cu_stream().addr());
        let kept = SCRATCHES.with_borrow_mut(|all| {
            let index = all.iter().position(|scratch| scratch.stream == stream)?;
            Some(all.swap_remove(index))
        });
        match kept {
            Some(scratch) => Ok(scratch),
            None => {
                let slice = device.alloc_zeros(SCRATCH_BYTES / size_of::<u64>())?;
                Ok(Self { stream, slice })
            }
        }
    }

    fn keep(self) {
        SCRATCHES.with_borrow_mut(|all| all.push(self));
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
        let architecture = choose_architecture(10 * major + minor, &nvrtc_architectures());
        context.load_module(compile(architecture, variant)?).map_err(load_error)
    })
}

/// An error of the driver. If the PTX is too new for it, the error says what to do.
fn load_error(error: DriverError) -> Error {
    let is_too_new = error.0 == CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    let error = Error::from(CudaError::Cuda(error));
    match is_too_new {
        true => error.context(
            "the NVIDIA driver is older than the NVRTC that compiled the kernels, and cannot load them: update the \
             driver, or use the NVRTC of a CUDA toolkit that is not newer than the driver",
        ),
        false => error,
    }
}

/// Compiles the source for an architecture. The GPUs of a process may have different architectures.
fn compile(architecture: i32, variant: KernelVariant) -> Result<Ptx> {
    static PTX: LazyLock<Cache<(i32, KernelVariant), Ptx>> = LazyLock::new(Cache::default);

    cached(&PTX, (architecture, variant), || {
        let options = CompileOptions {
            name: Some("cuda.cu".to_string()),
            options: vec![
                format!("--gpu-architecture=compute_{architecture}"),
                "--std=c++17".to_string(),
            ],
            ..CompileOptions::default()
        };
        let source = variant.definitions()? + &source(include_str!("cuda.cu"));
        compile_ptx_with_opts(source, options).w()
    })
}

/// The architectures that NVRTC compiles for. There are none if NVRTC does not list them.
fn nvrtc_architectures() -> Vec<i32> {
    let mut len = 0;
    // SAFETY: NVRTC writes one number.
    let counted = unsafe { sys::nvrtcGetNumSupportedArchs(&mut len) }.result();
    let mut architectures = vec![0; usize::try_from(len).unwrap_or(0)];
    if counted.is_err() || architectures.is_empty() {
        return Vec::new();
    }
    // SAFETY: NVRTC writes as many numbers as it counted.
    match unsafe { sys::nvrtcGetSupportedArchs(architectures.as_mut_ptr()) }.result() {
        Ok(()) => architectures,
        Err(_) => Vec::new(),
    }
}
