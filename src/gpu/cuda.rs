//! Launches on CUDA. NVRTC compiles `label_smoothing.cu` for the device's architecture when a variant is first
//! used, and the result is kept.

use super::kernel::{Buffer, GpuStorage, Grid, KernelKey, KernelVariant, Limits, cached};
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Result, Storage};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

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
        let CompiledPtx { name, ptx } = &*compile(device, kernel.variant)?;
        let function = device.get_or_load_custom_func(kernel.name, name, ptx)?;
        let mut launch = function.builder();
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

/// The compiled source.
struct CompiledPtx {
    /// The key in candle's cache of a device's modules.
    name: String,
    ptx: String,
}

/// Compiles the source for a device's architecture, or finds it compiled. The devices of a process may have
/// different architectures.
fn compile(device: &CudaDevice, variant: KernelVariant) -> Result<Arc<CompiledPtx>> {
    type Key = ((i32, i32), KernelVariant);
    static MODULES: LazyLock<Mutex<HashMap<Key, Arc<CompiledPtx>>>> = LazyLock::new(Mutex::default);

    let (major, minor) = device.cuda_stream().context().compute_capability().w()?;
    cached(&MODULES, ((major, minor), variant), || {
        let options = CompileOptions {
            name: Some("label_smoothing.cu".to_string()),
            options: vec![
                format!("--gpu-architecture=compute_{major}{minor}"),
                "--std=c++17".to_string(),
            ],
            ..CompileOptions::default()
        };
        let definitions = variant.definitions()?;
        let ptx = compile_ptx_with_opts(format!("{definitions}{SOURCE}"), options).w()?.to_src();
        Ok(Arc::new(CompiledPtx { name: format!("label-smoothing {definitions}"), ptx }))
    })
}
