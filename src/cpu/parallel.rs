//! Work shared between threads, in pieces that do not depend on the number of threads.

use crate::error::{Error, Result};
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Elements that a loop works on at a time: few enough for the stack and the first-level cache.
pub(super) const BLOCK: usize = 256;

/// Elements of one row that one thread works on, at most. The fuzz target makes short rows only, so it has short segments.
pub(super) const SEGMENT: usize = if cfg!(fuzzing) { 2 * BLOCK } else { 64 * BLOCK };

/// Elements below which waking a second thread costs more than it saves. Miri is slow, so there threads share small
/// tensors too.
pub(super) const MIN_TASK: usize = if cfg!(miri) { 1 } else { SEGMENT };

/// An empty vector with room for `len` elements.
fn reserve<T>(len: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    match vec.try_reserve_exact(len) {
        Ok(()) => Ok(vec),
        Err(_) => Err(Error::TooLarge { what: "an intermediate result", shape: vec![len] }),
    }
}

/// A vector of `len` defaults.
pub(super) fn default_vec<T: Copy + Default>(len: usize) -> Result<Vec<T>> {
    let mut out = reserve(len)?;
    out.resize(len, T::default());
    Ok(out)
}

/// Splits slices of equal length into pieces, and calls `f(start, pieces)` on several threads. Each `start` is a multiple
/// of `unit`, and each piece but the last has at least `unit` elements. One index is `cost` elements of work.
pub(super) fn par_split<T: Send, const N: usize>(
    mut slices: [&mut [T]; N],
    unit: usize,
    cost: usize,
    f: &(impl Fn(usize, [&mut [T]; N]) + Sync),
) {
    let piece_len = MIN_TASK.div_ceil(cost.max(1)).next_multiple_of(unit.max(1));
    let len = slices.first().map_or(0, |slice| slice.len());
    if len <= piece_len {
        return f(0, slices);
    }
    let pieces: Vec<_> = (0..len)
        .step_by(piece_len)
        .map(|start| {
            let end = piece_len.min(len - start);
            (start, slices.each_mut().map(|slice| slice.split_off_mut(..end).unwrap_or_default()))
        })
        .collect();
    pieces.into_par_iter().for_each(|(start, pieces)| f(start, pieces));
}

/// A vector of `len` elements. `f(start, writer)` writes those of a piece. Each `start` is a multiple of `unit`.
pub(super) fn par_build<T: Copy + Default + Send>(
    len: usize,
    unit: usize,
    f: impl Fn(usize, &mut SliceWriter<T>) + Sync,
) -> Result<Vec<T>> {
    let mut out = reserve(len)?;
    let spare: &mut [MaybeUninit<T>] = &mut out.spare_capacity_mut()[..len];
    advise_huge_pages(spare);
    par_split([spare], unit, 1, &|start, [slice]| {
        let mut writer = SliceWriter { slice, written: 0 };
        f(start, &mut writer);
        writer.slice[writer.written..].fill(MaybeUninit::new(T::default()));
    });
    // SAFETY: the vector is empty and has capacity for `len` elements. `par_split` covers each of them with one piece. The
    // writer counts only elements that it has written, and the closure above fills the rest of its piece. Zeroing
    // the whole vector first would write the largest allocation of a training step twice.
    unsafe { out.set_len(len) };
    Ok(out)
}

/// Replaces values. `f(start, old, writer)` gets the values of a piece, and writes the new ones. Those that it does not write keep
/// their old value. Each `start` is a multiple of `unit`.
pub(super) fn par_rewrite<T: Copy + Send>(
    values: &mut [T],
    unit: usize,
    f: impl Fn(usize, Vec<T>, &mut SliceWriter<T>) + Sync,
) -> Result<()> {
    let refused_len = AtomicUsize::new(0);
    par_split([values], unit, 1, &|start, [piece]| match reserve(piece.len()) {
        Err(_) => refused_len.store(piece.len(), Ordering::Relaxed),
        Ok(mut old) => {
            old.extend_from_slice(piece);
            let piece: *mut [T] = piece;
            // SAFETY: the piece stays borrowed mutably, and a writer only writes values, never uninitialised memory.
            let slice = unsafe { &mut *(piece as *mut [MaybeUninit<T>]) };
            f(start, old, &mut SliceWriter { slice, written: 0 });
        }
    });
    match refused_len.into_inner() {
        0 => Ok(()),
        len => Err(Error::TooLarge { what: "an intermediate result", shape: vec![len] }),
    }
}

/// Asks for huge pages under memory that will be written as a whole. Fresh memory is mapped page by page, at the first
/// write to each. Where Linux maps huge pages only on request (`madvise`, a common default), the page faults cost
/// several times the gradient's arithmetic.
#[cfg(target_os = "linux")]
pub(super) fn advise_huge_pages<T>(memory: &mut [T]) {
    const HUGE_PAGE: usize = 2 << 20;
    let range = memory.as_mut_ptr_range();
    let start = range.start.addr().next_multiple_of(HUGE_PAGE);
    let end = range.end.addr() / HUGE_PAGE * HUGE_PAGE;
    if start < end {
        let pages = range.start.with_addr(start).cast();
        // SAFETY: the pages lie within memory that is borrowed mutably here. The advice does not change their
        // contents, and the code does not depend on whether it is taken.
        unsafe { libc::madvise(pages, end - start, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn advise_huge_pages<T>(_: &mut [T]) {}

/// Writes a slice from its start to its end. Its memory may be uninitialised.
pub(super) struct SliceWriter<'a, T> {
    slice: &'a mut [MaybeUninit<T>],
    written: usize,
}

impl<T: Copy> SliceWriter<'_, T> {
    /// The number of elements not yet written.
    pub(super) fn remaining(&self) -> usize {
        self.slice.len() - self.written
    }

    /// Writes the values, or as many of them as fit.
    #[inline(always)]
    pub(super) fn write(&mut self, values: &[T]) {
        let slice = &mut self.slice[self.written..];
        let len = slice.len().min(values.len());
        slice.iter_mut().zip(values).for_each(|(slot, &value)| {
            slot.write(value);
        });
        self.written += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn par_split_covers_each_index_once() -> Result<()> {
        for len in [0, 1, 63, 64, 65, 3 * MIN_TASK + 200] {
            let (mut a, mut b) = (default_vec::<usize>(len)?, default_vec::<usize>(len)?);
            par_split([&mut a, &mut b], 64, 1, &|start, [a, b]| {
                assert!(start % 64 == 0 && a.len() == b.len());
                for (i, (a, b)) in a.iter_mut().zip(b).enumerate() {
                    *a += start + i;
                    *b += 1;
                }
            });
            assert!(a.iter().enumerate().all(|(i, &a)| a == i));
            assert!(b.iter().all(|&b| b == 1));
        }
        Ok(())
    }

    #[test]
    fn par_build_writes_several_pieces() -> Result<()> {
        let len = 3 * MIN_TASK + 200;
        let values = par_build::<f32>(len, 64, |start, writer| {
            assert!(start % 64 == 0);
            let piece: Vec<_> = (start + 1..).take(writer.remaining()).map(|i| i as f32).collect();
            writer.write(&piece);
        })?;
        assert!(values.iter().enumerate().all(|(i, &value)| value == (i + 1) as f32));
        Ok(())
    }

    #[test]
    fn par_rewrite_gives_each_piece_its_old_values() -> Result<()> {
        let mut values: Vec<usize> = (0..3 * MIN_TASK + 200).collect();
        par_rewrite(&mut values, 64, |start, old, writer| {
            assert!(start % 64 == 0 && old.len() == writer.remaining());
            assert!(old.iter().enumerate().all(|(i, &value)| value == start + i));
            for value in old {
                writer.write(&[2 * value]);
            }
        })?;
        assert!(values.iter().enumerate().all(|(i, &value)| value == 2 * i));
        Ok(())
    }

    #[test]
    fn unwritten_elements_are_zero() -> Result<()> {
        let built = par_build::<f32>(100, 100, |start, writer| {
            assert_eq!((start, writer.remaining()), (0, 100));
            writer.write(&[1.; 30]);
            assert_eq!(writer.remaining(), 70);
            writer.write(&[2.; 10]);
        })?;
        assert_eq!(built[..30], [1.; 30]);
        assert_eq!(built[30..40], [2.; 10]);
        assert_eq!(built[40..], [0.; 60]);
        let built = par_build::<f32>(3, 3, |_, writer| writer.write(&[1.; 5]))?;
        assert_eq!(built, [1.; 3]);
        Ok(())
    }
}
