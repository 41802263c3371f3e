//! Sharing work between threads, in pieces that do not depend on how many there are.

use super::element::Element;
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Elements that are worked on at a time, few enough for the stack and the first-level cache.
pub(super) const BLOCK: usize = 256;

/// Elements of one line that stay on one thread.
pub(super) const SEGMENT: usize = 64 * BLOCK;

/// Elements below which waking a second thread costs more than it saves.
pub(super) const GRAIN: usize = 64 * BLOCK;

/// An empty vector with room for `len` elements.
pub(super) fn reserve<T>(len: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    match vec.try_reserve_exact(len) {
        Ok(()) => Ok(vec),
        Err(_) => Err(Error::TooLarge { what: "an intermediate result", shape: vec![len] }),
    }
}

/// `f` of 0..len, each call of which touches `cost` elements.
pub(super) fn map<T: Send>(
    len: usize,
    cost: usize,
    f: impl Fn(usize) -> T + Sync + Send,
) -> Result<Vec<T>> {
    let mut out = reserve(len)?;
    if len.saturating_mul(cost) <= GRAIN {
        out.extend((0..len).map(f));
    } else {
        (0..len)
            .into_par_iter()
            .with_min_len(GRAIN.div_ceil(cost))
            .map(f)
            .collect_into_vec(&mut out);
    }
    Ok(out)
}

/// `len` elements in lines of `line_len`, made in blocks: `f` gets the line's index, the block's
/// start in the line, and the block to fill.
pub(super) fn build<T: Element>(
    len: usize,
    line_len: usize,
    f: impl Fn(usize, usize, &mut [T]) + Sync,
) -> Result<Vec<T>> {
    let mut out = reserve(len)?;
    let room: &mut [MaybeUninit<T>] = &mut out.spare_capacity_mut()[..len];
    split(room, line_len, 1, |line, room| {
        split(room, SEGMENT, 1, |segment, room| {
            let mut block = [T::ZERO; BLOCK];
            for (i, room) in room.chunks_mut(BLOCK).enumerate() {
                let block = &mut block[..room.len()];
                f(line, segment * SEGMENT + i * BLOCK, block);
                for (room, &value) in room.iter_mut().zip(&*block) {
                    room.write(value);
                }
            }
        });
    });
    // SAFETY: the vector has room for `len` elements, and `split` hands out each of them, which the
    // loop above then writes, whatever `f` does. Zeroing them first instead would write the largest
    // allocation of a training step twice.
    unsafe { out.set_len(len) };
    Ok(out)
}

/// `len` values to be overwritten.
pub(super) fn filled<T: Copy + Default>(len: usize) -> Result<Vec<T>> {
    let mut out = reserve(len)?;
    out.resize(len, T::default());
    Ok(out)
}

/// `f` of every chunk of `len` elements and its index; each element stands for `cost` of them.
pub(super) fn split<T: Send>(
    slice: &mut [T],
    len: usize,
    cost: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    let len = len.max(1);
    if slice.len().saturating_mul(cost) <= GRAIN {
        for (i, chunk) in slice.chunks_mut(len).enumerate() {
            f(i, chunk);
        }
    } else {
        slice
            .par_chunks_mut(len)
            .enumerate()
            .with_min_len(GRAIN.div_ceil(len.saturating_mul(cost)))
            .for_each(|(i, chunk)| f(i, chunk));
    }
}
