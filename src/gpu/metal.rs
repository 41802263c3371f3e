//! Launches on Metal. `label_smoothing.metal` is compiled when a device first uses a variant. The library, and a
//! pipeline for each kernel, are kept.

use super::kernel::{Buffer, GpuStorage, Grid, KernelKey, KernelVariant, Limits};
use crate::gpu_compile::{Cache, cached};
use candle_core::backend::BackendStorage;
use candle_core::{MetalDevice, MetalError, MetalStorage, Result, Storage};
use candle_metal_kernels::MetalKernelError;
use candle_metal_kernels::metal::{ComputeCommandEncoder, ComputePipeline, Library};
use objc2_metal::{
    MTLCompileOptions, MTLComputePipelineState, MTLMathFloatingPointFunctions, MTLMathMode, MTLSize,
};
use std::sync::LazyLock;

const SOURCE: &str = include_str!("label_smoothing.metal");

impl GpuStorage for MetalStorage {
    fn limits(device: &MetalDevice, kernel: KernelKey) -> Result<Limits> {
        let pipeline = pipeline(device, kernel)?;
        Ok(Limits {
            max_blocks: u32::MAX as usize,
            max_threads: pipeline.max_total_threads_per_threadgroup(),
            warp_size: pipeline.as_ref().threadExecutionWidth(),
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
        // Metal's API validation requires a buffer for every argument, so an input stands in for the unused ones.
        let placeholder = buffers.iter().find_map(|buffer| match buffer {
            Buffer::Input(storage) => Some(storage.buffer().clone()),
            Buffer::Output(_) | Buffer::Unused => None,
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
                Buffer::Unused => encoder.set_input_buffer(index, placeholder.as_ref(), 0),
            }
            index += 1;
        }
        encoder.set_bytes(index, params);
        let size = |width| MTLSize { width, height: 1, depth: 1 };
        encoder.dispatch_thread_groups(size(grid.blocks), size(grid.threads_per_block));
        Ok(())
    }
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
        let source = format!("{}{SOURCE}", variant.definitions()?);
        let library = metal.new_library_with_source(&source, Some(&options));
        Ok(library.map_err(|error| compile_error("label_smoothing.metal", error))?)
    })
}

/// An error with the compiler's message. candle's own error leaves it out where a pipeline failed.
fn compile_error(what: &str, error: MetalKernelError) -> MetalError {
    MetalError::Message(match error {
        MetalKernelError::FailedToCreatePipeline(message) => format!("{what}: {message}"),
        error => format!("{what}: {error}"),
    })
}
