//! Sharing work between threads, in pieces that do not depend on how many there are.

use super::element::Element;
use crate::error::{Error, Result};
use std::mem::MaybeUninit;

/// Elements that are worked on at a time, few enough for the stack and the first-level cache.
pub(super) const BLOCK: usize = 256;

/// Elements of one row that stay on one thread.
pub(super) const SEGMENT: usize = 64 * BLOCK;

/// Elements below which waking a second thread costs more than it saves. Miri, which is slow, sees threads at work on small
/// tensors too.
pub(super) const GRAIN: usize = if cfg!(miri) { 1 } else { 64 * BLOCK };

/// An empty vector with room for `len` elements.
fn reserve<T>(len: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    match vec.try_reserve_exact(len) {
        Ok(()) => Ok(vec),
        Err(_) => Err(Error::TooLarge { what: "an intermediate result", shape: vec![len] }),
    }
}

/// `len` values to be overwritten.
pub(super) fn filled<T: Copy + Default>(len: usize) -> Result<Vec<T>> {
    let mut out = reserve(len)?;
    out.resize(len, T::default());
    Ok(out)
}

/// Several slices of one length in pieces: `f` gets a piece's start, a multiple of `len`, and the piece
/// of each slice, at least `len` long but for the last one. Each index stands for `cost` elements.
pub(super) fn split<T: Send, const N: usize>(
    slices: [&mut [T]; N],
    len: usize,
    cost: usize,
    f: &(impl Fn(usize, [&mut [T]; N]) + Sync),
) {
    let len = GRAIN.div_ceil(cost.max(1)).next_multiple_of(len.max(1));
    split_from(0, slices, len, f);
}

fn split_from<T: Send, const N: usize>(
    start: usize,
    slices: [&mut [T]; N],
    len: usize,
    f: &(impl Fn(usize, [&mut [T]; N]) + Sync),
) {
    let pieces = slices.first().map_or(0, |slice| slice.len()).div_ceil(len);
    if pieces <= 1 {
        return f(start, slices);
    }
    let middle = pieces / 2 * len;
    let mut right = [const { None }; N];
    let mut right_of = right.iter_mut();
    let left = slices.map(|slice| {
        let (left, right) = slice.split_at_mut(middle);
        if let Some(slot) = right_of.next() {
            *slot = Some(right);
        }
        left
    });
    let right = right.map(Option::unwrap_or_default);
    rayon::join(|| split_from(start, left, len, f), || split_from(start + middle, right, len, f));
}

/// `len` elements that `f` makes from the start of a piece on. Pieces begin at multiples of `piece`.
pub(super) fn build<T: Element>(
    len: usize,
    piece: usize,
    f: impl Fn(usize, &mut Sink<T>) + Sync,
) -> Result<Vec<T>> {
    Ok(build_in(reserve(len)?, len, piece, f))
}

/// Replaces values: `f` makes new ones from a piece's start and the piece. Each is read and written while it
/// is in the cache.
pub(super) fn rewrite<T: Element>(
    values: &mut [T],
    piece: usize,
    f: impl Fn(usize, &[T], &mut Sink<T>) + Sync,
) {
    split([values], piece, 1, &|start, [values]| {
        let len = values.len();
        let room = Vec::with_capacity(len);
        values.copy_from_slice(&build_in(room, len, len, |_, sink| f(start, values, sink)));
    });
}

/// `len` elements in an empty vector that has room for them.
fn build_in<T: Element>(
    mut out: Vec<T>,
    len: usize,
    piece: usize,
    f: impl Fn(usize, &mut Sink<T>) + Sync,
) -> Vec<T> {
    let room: &mut [MaybeUninit<T>] = &mut out.spare_capacity_mut()[..len];
    advise_huge_pages(room);
    split([room], piece, 1, &|start, [room]| {
        let mut sink = Sink { room, filled: 0 };
        f(start, &mut sink);
        sink.room[sink.filled..].fill(MaybeUninit::new(T::ZERO));
    });
    // SAFETY: the vector is empty and has room for `len` elements, or the slice above would not be there,
    // and `split` hands out each of them. The closure above writes those of its piece that the sink has not,
    // and the sink counts only what it has written. Zeroing them all first instead would write the largest
    // allocation of a training step twice.
    unsafe { out.set_len(len) };
    out
}

/// Asks for large pages under memory that will be written as a whole. Fresh memory comes page by page,
/// at the first write to each; where the system hands out large pages only on request (Linux's
/// `madvise` setting, a common default), the page faults cost several times the gradient's arithmetic.
#[cfg(target_os = "linux")]
fn advise_huge_pages<T>(room: &mut [MaybeUninit<T>]) {
    const HUGE_PAGE: usize = 2 << 20;
    let range = room.as_mut_ptr_range();
    let start = range.start.addr().next_multiple_of(HUGE_PAGE);
    let end = range.end.addr() / HUGE_PAGE * HUGE_PAGE;
    if start < end {
        let pages = range.start.with_addr(start).cast();
        // SAFETY: the pages lie within memory that is borrowed here alone. The advice changes nothing
        // that they hold, and whether it is taken is all the same.
        unsafe { libc::madvise(pages, end - start, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages<T>(_: &mut [MaybeUninit<T>]) {}

/// A piece of memory to be filled from its start to its end.
pub(super) struct Sink<'a, T> {
    room: &'a mut [MaybeUninit<T>],
    filled: usize,
}

impl<T: Copy> Sink<'_, T> {
    /// How many elements are still to come.
    pub(super) fn len(&self) -> usize {
        self.room.len() - self.filled
    }

    /// Adds the values, as far as there is room.
    #[inline(always)]
    pub(super) fn push(&mut self, values: &[T]) {
        let room = &mut self.room[self.filled..];
        let len = room.len().min(values.len());
        room.iter_mut().zip(values).for_each(|(room, &value)| {
            room.write(value);
        });
        self.filled += len;
    }

    /// Replaces the value that was added `back` values before the next one.
    pub(super) fn replace(&mut self, back: usize, value: T) {
        let filled = &mut self.room[..self.filled];
        if let Some(last) = filled.iter_mut().nth_back(back.wrapping_sub(1)) {
            last.write(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_once() -> Result<()> {
        for len in [0, 1, 63, 64, 65, 3 * GRAIN + 200] {
            let (mut a, mut b) = (filled::<usize>(len)?, filled::<usize>(len)?);
            split([&mut a, &mut b], 64, 1, &|start, [a, b]| {
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
    fn pieces_come_together() -> Result<()> {
        let len = 3 * GRAIN + 200;
        let mut values = build::<f32>(len, 64, |start, sink| {
            assert!(start % 64 == 0);
            let piece: Vec<_> = (start + 1..).take(sink.len()).map(|i| i as f32).collect();
            sink.push(&piece);
        })?;
        assert!(values.iter().enumerate().all(|(i, &value)| value == (i + 1) as f32));
        rewrite(&mut values, 64, |start, piece, sink| {
            assert_eq!((piece.len(), piece.first()), (sink.len(), Some(&((start + 1) as f32))));
            piece.iter().for_each(|value| sink.push(&[-value]));
        });
        assert!(values.iter().enumerate().all(|(i, &value)| value == -((i + 1) as f32)));
        Ok(())
    }

    #[test]
    fn what_is_not_filled_is_zero() -> Result<()> {
        let built = build::<f32>(100, 100, |start, sink| {
            assert_eq!((start, sink.len()), (0, 100));
            sink.push(&[1.; 30]);
            assert_eq!(sink.len(), 70);
            sink.push(&[2.; 10]);
        })?;
        assert_eq!(built[..30], [1.; 30]);
        assert_eq!(built[30..40], [2.; 10]);
        assert_eq!(built[40..], [0.; 60]);
        let built = build::<f32>(3, 3, |_, sink| {
            sink.push(&[1.; 5]);
            sink.replace(1, 2.);
            sink.replace(0, 3.);
            sink.replace(4, 3.);
        })?;
        assert_eq!(built, [1., 1., 2.]);
        Ok(())
    }
}
