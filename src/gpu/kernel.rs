//! The interface to a GPU: its storage, the launch of a kernel, and the variants that a kernel is compiled in.

use crate::error::{Error, Result};
use crate::formula::{LossParams, result_dtype};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{DType, Storage};

/// A storage in a GPU's memory, and launches on that GPU.
pub(crate) trait GpuStorage: BackendStorage<Device: BackendDevice<Storage = Self>> {
    /// The limits of a launch of the kernel.
    fn limits(device: &Self::Device, kernel: KernelKey) -> candle_core::Result<Limits>;

    /// The number of elements.
    fn len(&self) -> usize;

    /// The storage, if it is of this backend.
    fn from_storage(storage: &Storage) -> Option<&Self>;

    /// Allocates `len` elements of unspecified value. It allocates at least one, because devices refuse to
    /// allocate no memory.
    fn alloc(device: &Self::Device, len: usize, dtype: DType) -> candle_core::Result<Self> {
        // SAFETY: every bit pattern is a valid number, and a kernel writes each element before it is read.
        unsafe { device.alloc_uninit(&len.max(1).into(), dtype) }
    }

    /// Queues a kernel on the device.
    ///
    /// # Safety
    /// The kernel must take these buffers, followed by `params`, and its threads must access each buffer
    /// within its bounds.
    unsafe fn launch<P: Copy>(
        device: &Self::Device,
        kernel: KernelKey,
        grid: Grid,
        buffers: &mut [Buffer<Self>],
        params: &P,
    ) -> candle_core::Result<()>;
}

/// The text of a dialect, with the shared text in its place.
#[cfg(any(feature = "cuda", feature = "metal"))]
pub(crate) fn source(dialect: &str) -> String {
    dialect.replace("#include \"kernels.inc\"", include_str!("kernels.inc"))
}

/// The size of a launch. A block is a threadgroup in Metal's terms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub blocks: usize,
    pub threads_per_block: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The largest number of blocks in a launch.
    pub max_blocks: usize,
    /// The number of blocks that keep the device busy.
    pub target_blocks: usize,
    /// The largest number of threads in a block.
    pub max_threads: usize,
    /// The number of threads in a warp (a simdgroup in Metal's terms), a power of two.
    pub warp_size: usize,
    /// Whether the last block of a launch reads what the other blocks have written. Otherwise that takes a second launch.
    pub joins_blocks: bool,
}

/// An argument of a kernel that is a pointer.
pub(crate) enum Buffer<'a, S> {
    Input(&'a S),
    Output(&'a mut S),
    /// Memory of [`SCRATCH_BYTES`] that launches on one stream share. It is zero before the first.
    Scratch,
    /// The kernel does not access it in this launch.
    Unused,
}

/// The largest number of blocks that sum losses in one launch: `MAX_PARTIALS` in the kernel source.
pub(crate) const MAX_PARTIALS: usize = 4096;
/// The size of `Scratch` in the kernel source, with f64.
pub(crate) const SCRATCH_BYTES: usize = 16 + 4 * MAX_PARTIALS * size_of::<f64>();

impl<'a, S> Buffer<'a, S> {
    pub fn optional_input(storage: Option<&'a S>) -> Self {
        storage.map_or(Self::Unused, Self::Input)
    }

    pub fn optional_output(storage: Option<&'a mut S>) -> Self {
        storage.map_or(Self::Unused, Self::Output)
    }
}

/// The types that the kernel source is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KernelVariant {
    pub logits: DType,
    pub targets: DType,
    /// Whether the class params differ between classes.
    pub per_class: bool,
    pub options: Options,
}

/// The options that the kernels compute, as a sum. A kernel without an option has no instruction for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Options(pub u32);

impl Options {
    /// The options that are set. The kernel source names their values.
    pub fn new(params: &LossParams) -> Self {
        let map = params.logit_map;
        let is_set = [
            map.is_some(),
            map.is_some_and(|map| map.cap.is_some()),
            params.row_weights.is_some(),
            params.unmasked_epsilon != 0.,
            params.wants_metrics,
        ];
        Self((0..).zip(is_set).map(|(bit, is_set)| u32::from(is_set) << bit).sum())
    }
}

/// The key of a compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KernelKey {
    /// The entry point.
    pub name: &'static str,
    pub variant: KernelVariant,
}

impl KernelVariant {
    /// The macro definitions that are put before the kernel source, which documents them.
    #[cfg(any(feature = "cuda", feature = "metal"))]
    pub fn definitions(self) -> Result<String> {
        Ok(self.input_definitions()? + &format!("#define OPTIONS {}\n", self.options.0))
    }

    /// The definitions without the options. The emulator's kernels have all options.
    pub fn input_definitions(self) -> Result<String> {
        let logits = type_name(self.logits)?;
        let real = type_name(result_dtype(self.logits))?;
        let targets = type_name(self.targets)?;
        let class_targets = u8::from(self.targets.is_int());
        let per_class = u8::from(self.per_class);
        Ok(format!(
            "#define LOGITS {logits}\n#define REAL {real}\n#define TARGETS {targets}\n\
             #define CLASS_TARGETS {class_targets}\n#define PER_CLASS {per_class}\n"
        ))
    }
}

/// The name of a dtype in the kernel source.
fn type_name(dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::U8 => "u8",
        DType::U32 => "u32",
        DType::I16 => "i16",
        DType::I32 => "i32",
        DType::I64 => "i64",
        DType::F8E4M3 => "f8",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::F32 => "f32",
        DType::F64 => "f64",
        dtype => {
            let expected = "a class index or a probability";
            return Err(Error::TargetsDType { dtype, expected });
        }
    })
}
