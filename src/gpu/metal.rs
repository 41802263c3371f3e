//! Launches on Metal. The kernels are compiled when a device first uses a variant. The library, and a pipeline for each kernel,
//! are kept.

use super::kernel::{
    Buffer, GpuStorage, Grid, KernelKey, KernelVariant, Limits, SCRATCH_BYTES, source,
};
use crate::gpu_compile::{Cache, cached};
use candle_core::backend::BackendStorage;
use candle_core::{DType, MetalDevice, MetalError, MetalStorage, Result, Storage};
use candle_metal_kernels::MetalKernelError;
use candle_metal_kernels::metal::{
    Buffer as MetalBuffer, ComputeCommandEncoder, ComputePipeline, Library,
};
use objc2_metal::{
    MTLCompileOptions, MTLComputePipelineState, MTLMathFloatingPointFunctions, MTLMathMode, MTLSize,
};
use std::cell::RefCell;
use std::collections::{HashMap, hash_map::Entry};
use std::sync::{Arc, LazyLock};

/// The number of threadgroups that keep a large GPU busy. Metal does not tell how many cores a GPU has.
const TARGET_BLOCKS: usize = 512;

thread_local! {
    /// The memory of [`Buffer::Scratch`] on each device. Each thread has its own, because it may commit commands of its own.
    static SCRATCHES: RefCell<HashMap<u64, Arc<MetalBuffer>>> = RefCell::default();
}

impl GpuStorage for MetalStorage {
    fn limits(device: &MetalDevice, kernel: KernelKey) -> Result<Limits> {
        let pipeline = pipeline(device, kernel)?;
        Ok(Limits {
            max_blocks: u32::MAX as usize,
            target_blocks: TARGET_BLOCKS,
            max_threads: pipeline.max_total_threads_per_threadgroup(),
            warp_size: pipeline.as_ref().threadExecutionWidth(),
            joins_blocks: false,
        })
    }

    fn len(&self) -> usize {
        self.buffer().length() / self.dtype().size_in_bytes().max(1)
    }

    fn from_storage(storage: &Storage) -> Option<&Self> {
        match storage {
            Storage::Metal(storage) => Some(storage),
            _ => None,
        }
    }

    unsafe fn launch<P: Copy>(
        device: &MetalDevice,
        kernel: KernelKey,
        grid: Grid,
        buffers: &mut [Buffer<Self>],
        params: &P,
    ) -> Result<()> {
        let pipeline = pipeline(device, kernel)?;
        let guard = device.command_encoder()?;
        let encoder: &ComputeCommandEncoder = guard.as_ref();
        encoder.set_label(kernel.name);
        encoder.set_compute_pipeline_state(&pipeline);
        let scratch = scratch(device)?;
        // Metal's API validation requires a buffer for every argument, so an input stands in for the unused ones.
        let placeholder = buffers.iter().find_map(|buffer| match buffer {
            Buffer::Input(storage) => Some(storage.buffer().clone()),
            _ => None,
        });
        // By these two methods candle tracks which kernels have to wait for which.
        let mut index = 0;
        for buffer in buffers {
            match buffer {
                Buffer::Input(storage) => {
                    encoder.set_input_buffer(index, Some(storage.buffer()), 0)
                }
                Buffer::Output(storage) => {
                    encoder.set_output_buffer(index, Some(storage.buffer()), 0)
                }
                Buffer::Scratch => encoder.set_output_buffer(index, Some(&scratch), 0),
                Buffer::Unused => {
                    encoder.set_input_buffer(index, placeholder.as_ref().or(Some(&scratch)), 0)
                }
            }
            index += 1;
        }
        encoder.set_bytes(index, params);
        let size = |width| MTLSize { width, height: 1, depth: 1 };
        encoder.dispatch_thread_groups(size(grid.blocks), size(grid.threads_per_block));
        Ok(())
    }
}

/// The scratch memory of this thread on a device. The kernels need no zeros in it, because Metal's have no ticket.
fn scratch(device: &MetalDevice) -> Result<Arc<MetalBuffer>> {
    SCRATCHES.with_borrow_mut(|scratches| {
        Ok(match scratches.entry(device.metal_device().registry_id()) {
            Entry::Occupied(entry) => entry.get().clone(),
            Entry::Vacant(entry) => {
                entry.insert(device.new_buffer(SCRATCH_BYTES, DType::U8, "scratch")?).clone()
            }
        })
    })
}

/// Compiles a kernel for a device, or finds it compiled.
fn pipeline(device: &MetalDevice, kernel: KernelKey) -> Result<ComputePipeline> {
    static PIPELINES: LazyLock<Cache<(u64, KernelKey), ComputePipeline>> =
        LazyLock::new(Cache::default);

    let metal = device.metal_device();
    cached(&PIPELINES, (metal.registry_id(), kernel), || {
        let function = library(device, kernel.variant)?
            .get_function(kernel.name, None)
            .map_err(|error| compile_error(kernel.name, error))?;
        let pipeline = metal.new_compute_pipeline_state_with_function(&function);
        Ok(pipeline.map_err(|error| compile_error(kernel.name, error))?)
    })
}

/// Compiles all kernels of the source for a device, or finds them compiled.
fn library(device: &MetalDevice, variant: KernelVariant) -> Result<Library> {
    static LIBRARIES: LazyLock<Cache<(u64, KernelVariant), Library>> =
        LazyLock::new(Cache::default);

    let metal = device.metal_device();
    cached(&LIBRARIES, (metal.registry_id(), variant), || {
        // The default is fast math, which assumes that no number is NaN or infinite. Since macOS 15, a second option sets
        // the accuracy of exp and log.
        let options = MTLCompileOptions::new();
        if objc2::available!(macos = 15, ios = 18) {
            options.setMathMode(MTLMathMode::Safe);
            options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
        } else {
            #[allow(deprecated, reason = "older systems have nothing else")]
            options.setFastMathEnabled(false);
        }
        let source = variant.definitions()? + &source(include_str!("metal.metal"));
        let library = metal.new_library_with_source(&source, Some(&options));
        Ok(library.map_err(|error| compile_error("metal.metal", error))?)
    })
}

/// An error with the compiler's message. candle's own error leaves it out where a pipeline failed.
fn compile_error(what: &str, error: MetalKernelError) -> MetalError {
    MetalError::Message(match error {
        MetalKernelError::FailedToCreatePipeline(message) => format!("{what}: {message}"),
        error => format!("{what}: {error}"),
    })
}
