//! What every backend is given: the formula's coefficients and where the rows lie in memory.
//!
//! A backend is a forward and a backward kernel for one problem, whatever the options, because
//! every option is a case of one formula. With logits x of a row, its target y (or probabilities
//! p), and the coefficients of each class, the row's smoothed and weighted targets are
//!
//! ```text
//! r_k  = own_k if k = y, else spread_k          class targets
//! r_k  = scale_k · p_k + spread_k               probabilities
//! S    = Σ_k r_k
//! loss = Σ_k r_k·(lse − x_k) + z·lse²           lse = logsumexp(x)
//! ∂loss/∂x_k = softmax_k·(S + 2·z·lse) − r_k
//! ```

#[cfg_attr(emulator, allow(dead_code, reason = "only labels are checked on the CPU there"))]
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(emulator)]
#[path = "../tests/emulator/backend.rs"]
pub(crate) mod emulated;
#[cfg(any(feature = "cuda", feature = "metal", emulator))]
mod gpu;
#[cfg(feature = "metal")]
pub(crate) mod metal;

/// What works on tensors in the host's memory: in the tests of the GPU backends, their emulator.
#[cfg(not(emulator))]
pub(crate) use cpu as host;
#[cfg(emulator)]
pub(crate) use emulated as host;

use crate::error::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Layout, Storage, Tensor};

/// What a row's targets weigh for one class.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Coefficient {
    /// The factor of a probability p_k.
    pub scale: f64,
    /// What the class gets whatever the target.
    pub spread: f64,
    /// What the class gets if it is the target: scale + spread, free of their rounding.
    pub own: f64,
    /// The class weight, by which a `Mean` divides.
    pub weight: f64,
}

/// The coefficients of all classes.
#[derive(Clone, Debug)]
pub(crate) enum Coefficients {
    /// The same for every class.
    Uniform(Coefficient),
    /// A tensor (4, K) on the logits' device, in the dtype of the arithmetic: a row for each field
    /// of [`Coefficient`], in their order.
    PerClass(Tensor),
}

/// One loss to compute, checked.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub class_dim: usize,
    pub num_classes: usize,
    /// The first of the classes whose logits are given: they may be a range of all.
    pub first_class: usize,
    pub coefficients: Coefficients,
    pub ignore_index: Option<i64>,
    pub z_loss: f64,
}

/// A tensor's numbers and where they lie.
pub(crate) type Operand<'a, S> = (&'a S, &'a Layout);

/// What becomes of the rows' losses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reduce {
    /// They are left as they are.
    No,
    /// They are added up, and divided by a number.
    DividedBy(f64),
    /// They are added up, and divided by the sum of the rows' class weights.
    DividedByWeights,
}

/// What a backend's forward gives.
pub(crate) struct Forward<S> {
    /// The losses of the rows, or what they were reduced to.
    pub result: S,
    /// A scalar: the sum of the rows' class weights, if the losses were divided by it.
    pub divisor: Option<S>,
    /// What backward needs again, (3, N): the logits' maximum, Σ exp(x − maximum), and S.
    pub statistics: Option<S>,
}

/// Whether logits may have the dtype.
pub(crate) fn is_of_logits(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}

/// The dtype of the arithmetic, which is also that of the result.
pub(crate) fn result_dtype(logits: DType) -> DType {
    match logits {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Checks that the device can compute with the dtype.
pub(crate) fn check_dtype(what: &'static str, dtype: DType, device: &Device) -> Result<()> {
    match (device, dtype) {
        (Device::Metal(_), DType::F64) => Err(Error::MetalF64 { what }),
        _ => Ok(()),
    }
}

/// Checks that a layout stays inside its storage of `len` elements: the kernels index by it.
pub(crate) fn check_layout(layout: &Layout, len: usize) -> Result<()> {
    let dims = || layout.dims().iter().zip(layout.stride());
    let last = dims().try_fold(layout.start_offset(), |last, (&len, &stride)| {
        last.checked_add(len.saturating_sub(1).checked_mul(stride)?)
    });
    if dims().all(|(&len, _)| len > 0) && last.is_none_or(|last| last >= len) {
        return Err(Error::Layout {
            shape: layout.dims().to_vec(),
            stride: layout.stride().to_vec(),
            offset: layout.start_offset(),
            len,
        });
    }
    Ok(())
}

/// Checks that a tensor stays inside its storage, before candle's own operations read it: they rely on it.
pub(crate) fn check_storage(tensor: &Tensor) -> Result<()> {
    let (storage, layout) = tensor.storage_and_layout();
    let len = match &*storage {
        Storage::Cpu(storage) => match storage {
            CpuStorage::F8E4M3(values) => values.len(),
            CpuStorage::BF16(values) => values.len(),
            CpuStorage::F16(values) => values.len(),
            CpuStorage::F32(values) => values.len(),
            CpuStorage::F64(values) => values.len(),
            // What is given here is floating-point numbers.
            _ => return Ok(()),
        },
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => gpu::Gpu::len(storage),
        #[cfg(feature = "metal")]
        Storage::Metal(storage) => gpu::Gpu::len(storage),
        #[cfg(not(feature = "cuda"))]
        Storage::Cuda(_) => return Ok(()),
        #[cfg(not(feature = "metal"))]
        Storage::Metal(_) => return Ok(()),
    };
    check_layout(layout, len)
}

/// Checks that a tensor of this shape can be addressed in bytes, of whatever dtype. A view made by
/// broadcasting can be far larger than the memory behind it.
pub(crate) fn check_size(what: &'static str, shape: &[usize]) -> Result<()> {
    const LARGEST: usize = isize::MAX as usize / size_of::<f64>();
    // An empty tensor may have other dimensions of any length, which are multiplied all the same.
    let size =
        shape.iter().filter(|&&len| len != 0).try_fold(1usize, |size, &len| size.checked_mul(len));
    match size {
        Some(size) if size <= LARGEST => Ok(()),
        _ => Err(Error::TooLarge { what, shape: shape.to_vec() }),
    }
}

/// Checks that there is memory for `len` numbers. A view can be far larger than the memory behind it, and where candle
/// makes a tensor of it, it would abort.
pub(crate) fn check_memory(what: &'static str, shape: &[usize], len: usize) -> Result<()> {
    match Vec::<f64>::new().try_reserve_exact(len) {
        Ok(()) => Ok(()),
        Err(_) => Err(Error::TooLarge { what, shape: shape.to_vec() }),
    }
}

/// Targets as the kernels read them: constants, of any dtype that is a class index or a probability.
pub(crate) fn readable_targets(targets: &Tensor) -> Result<Tensor> {
    match targets.dtype() {
        DType::U8 | DType::U32 | DType::I16 | DType::I32 | DType::I64 => Ok(targets.detach()),
        DType::F8E4M3 | DType::BF16 | DType::F16 | DType::F32 | DType::F64 => Ok(targets.detach()),
        dtype => Err(Error::TargetsDType {
            dtype,
            expected: "an integer dtype (class indices) or F8E4M3, F16, BF16, F32 or F64 (probabilities)",
        }),
    }
}

/// The shape of the rows: the logits' without the class dimension.
pub(crate) fn row_shape(logits: &[usize], class_dim: usize) -> Vec<usize> {
    let mut rows = logits.to_vec();
    rows.remove(class_dim);
    rows
}

/// How many rows there are; with a class dimension beyond the dimensions, every element is one.
pub(crate) fn num_rows(dims: &[usize], class_dim: usize) -> usize {
    let others = dims.iter().enumerate().filter(|(dim, _)| *dim != class_dim);
    others.map(|(_, len)| len).product()
}

/// The rows of a tensor: all positions of its dimensions but the class dimension, in row-major
/// order, at whatever strides.
///
/// Neighbouring dimensions that can be walked as one are merged, so that the rows of a contiguous
/// tensor are a single dimension and finding one takes no division.
#[derive(Debug)]
pub(crate) struct Rows {
    start: usize,
    outer: Vec<Dim>,
    inner: Dim,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Dim {
    pub len: usize,
    pub stride: usize,
}

/// Rows that follow each other at one stride.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub offset: usize,
    pub stride: usize,
    pub len: usize,
}

impl Rows {
    /// The rows of a layout; without a class dimension every element is a row of its own.
    pub fn new(layout: &Layout, class_dim: Option<usize>) -> Self {
        let mut outer: Vec<Dim> = Vec::new();
        for (dim, (&len, &stride)) in layout.dims().iter().zip(layout.stride()).enumerate() {
            if Some(dim) == class_dim || len == 1 {
                continue;
            }
            match outer.last_mut() {
                Some(last) if last.stride == stride * len => {
                    *last = Dim { len: last.len * len, stride }
                }
                _ => outer.push(Dim { len, stride }),
            }
        }
        let inner = outer.pop().unwrap_or(Dim { len: 1, stride: 0 });
        Self { start: layout.start_offset(), outer, inner }
    }

    /// The merged dimensions, the innermost last; at least one.
    #[cfg(any(feature = "cuda", feature = "metal", emulator))]
    pub fn dims(&self) -> impl Iterator<Item = Dim> {
        self.outer.iter().copied().chain([self.inner])
    }

    /// The longest run that begins at `row`.
    pub fn run(&self, row: usize) -> Run {
        let (mut rest, index) = match self.outer.is_empty() {
            true => (0, row),
            false => (row / self.inner.len, row % self.inner.len),
        };
        let mut offset = self.start + index * self.inner.stride;
        for dim in self.outer.iter().rev() {
            offset += rest % dim.len * dim.stride;
            rest /= dim.len;
        }
        Run { offset, stride: self.inner.stride, len: self.inner.len - index }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row's offset, the slow and plain way.
    fn offsets(layout: &Layout, class_dim: Option<usize>) -> Vec<usize> {
        let mut offsets = vec![layout.start_offset()];
        for (dim, (&len, &stride)) in layout.dims().iter().zip(layout.stride()).enumerate() {
            if Some(dim) != class_dim {
                offsets =
                    offsets.iter().flat_map(|o| (0..len).map(move |i| o + i * stride)).collect();
            }
        }
        offsets
    }

    fn check(layout: &Layout, class_dim: Option<usize>) {
        let rows = Rows::new(layout, class_dim);
        let expected = offsets(layout, class_dim);
        for (row, &offset) in expected.iter().enumerate() {
            let run = rows.run(row);
            assert_eq!(run.offset, offset, "row {row} of {layout:?}");
            for i in 0..run.len {
                assert_eq!(
                    run.offset + i * run.stride,
                    expected[row + i],
                    "{i} after row {row} of {layout:?}"
                );
            }
        }
    }

    #[test]
    fn rows_lie_where_the_layout_says() -> candle_core::Result<()> {
        let contiguous = Layout::contiguous((2, 3, 4, 5));
        let layouts = [
            contiguous.clone(),
            contiguous.narrow(1, 1, 2)?.narrow(3, 2, 3)?,
            contiguous.transpose(1, 3)?,
            contiguous.permute(&[3, 0, 2, 1])?,
            Layout::contiguous((1, 3, 1, 5)).broadcast_as((2, 3, 4, 5))?,
            contiguous.narrow(2, 0, 1)?,
            contiguous.narrow(0, 0, 0)?,
        ];
        for layout in &layouts {
            check(layout, None);
            (0..4).for_each(|class_dim| check(layout, Some(class_dim)));
        }
        check(&Layout::contiguous(()), None);
        check(&Layout::contiguous(7), Some(0));
        Ok(())
    }

    #[test]
    fn rows_of_a_contiguous_tensor_are_one_run() {
        let layout = Layout::contiguous((2, 3, 4, 5));
        assert_eq!(Rows::new(&layout, Some(3)).run(0).len, 24);
        assert_eq!(Rows::new(&layout, None).run(0).len, 120);
    }
}
