//! Where the rows of a tensor lie in memory, and checks of sizes.

use crate::error::{Error, Result};
use candle_core::Layout;
use std::hint::black_box;

/// A tensor's storage and its layout.
pub(crate) type Operand<'a, S> = (&'a S, &'a Layout);

/// A tensor's storage, to be changed, and its layout.
pub(crate) type OperandMut<'a, S> = (&'a mut S, &'a Layout);

/// The shape of the rows: the logits' without the class dimension.
pub(crate) fn row_shape(logits: &[usize], class_dim: usize) -> Vec<usize> {
    let mut rows = logits.to_vec();
    rows.remove(class_dim);
    rows
}

/// The number of rows. If the class dimension is beyond the rank, every element is a row.
pub(crate) fn num_rows(dims: &[usize], class_dim: usize) -> usize {
    let others = dims.iter().enumerate().filter(|(dim, _)| *dim != class_dim);
    others.map(|(_, len)| len).product()
}

/// The number of elements between one class and the next of a contiguous tensor.
pub(crate) fn inner_size(dims: &[usize], class_dim: usize) -> usize {
    dims.iter().skip(class_dim + 1).product()
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

/// Checks that a tensor of this shape can be addressed in bytes, in any dtype. A broadcast view can be far
/// larger than the memory behind it.
pub(crate) fn check_size(what: &'static str, shape: &[usize]) -> Result<()> {
    const MAX_LEN: usize = isize::MAX as usize / size_of::<f64>();
    // candle multiplies the other dimensions of an empty tensor too.
    let size =
        shape.iter().filter(|&&len| len != 0).try_fold(1usize, |size, &len| size.checked_mul(len));
    match size {
        Some(size) if size <= MAX_LEN => Ok(()),
        _ => Err(Error::TooLarge { what, shape: shape.to_vec() }),
    }
}

/// Checks that the allocator grants memory for `len` numbers. Where candle copies a broadcast view that is larger than the
/// memory, the process would abort.
pub(crate) fn check_memory(what: &'static str, shape: &[usize], len: usize) -> Result<()> {
    let mut numbers = Vec::<f64>::new();
    if numbers.try_reserve_exact(len).is_err() {
        return Err(Error::TooLarge { what, shape: shape.to_vec() });
    }
    // Without this use the compiler may leave out the allocation.
    black_box(&numbers);
    Ok(())
}

/// The offset of each row: of all positions in the dimensions other than the class dimension, in row-major
/// order, at any strides.
///
/// Neighbouring dimensions whose strides follow from each other are merged. So the rows of a contiguous tensor with the
/// class dimension first or last are one dimension, and no division is needed to find one.
#[derive(Debug)]
pub(crate) struct RowOffsets {
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
pub(crate) struct RowRun {
    pub offset: usize,
    pub stride: usize,
    pub len: usize,
}

impl RowOffsets {
    /// The rows of a layout. Without a class dimension every element is a row.
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
    pub fn run(&self, row: usize) -> RowRun {
        let (mut outer_index, index) = match self.outer.is_empty() {
            true => (0, row),
            false => (row / self.inner.len, row % self.inner.len),
        };
        let mut offset = self.start + index * self.inner.stride;
        for dim in self.outer.iter().rev() {
            offset += outer_index % dim.len * dim.stride;
            outer_index /= dim.len;
        }
        RowRun { offset, stride: self.inner.stride, len: self.inner.len - index }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The offset of every row, one by one.
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
        let rows = RowOffsets::new(layout, class_dim);
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
    fn row_offsets_agree_with_the_strides() -> candle_core::Result<()> {
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
        assert_eq!(RowOffsets::new(&layout, Some(3)).run(0).len, 24);
        assert_eq!(RowOffsets::new(&layout, None).run(0).len, 120);
    }
}
