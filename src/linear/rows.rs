//! The rows whose logits `forward_linear` computes.

use crate::autograd::{self, Saved};
use crate::error::Result;
use crate::formula::LossParams;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// The rows whose logits are computed: on the CPU those that count, on a GPU all.
pub(super) struct ComputedRows {
    /// The shape of all rows.
    pub shape: Vec<usize>,
    /// The number of computed rows.
    pub len: usize,
    /// The index among all rows of each computed row, or `None` if all are computed.
    indices: Option<Vec<i64>>,
}

impl ComputedRows {
    /// Checks class targets and row weights on the CPU, and finds the rows that count.
    pub fn new(
        params: &LossParams,
        dtype: DType,
        targets: &Tensor,
        shape: Vec<usize>,
    ) -> Result<Self> {
        let indices = counted_rows(params, dtype, targets)?;
        let len = indices.as_ref().map_or_else(|| shape.iter().product(), Vec::len);
        Ok(Self { shape, len, indices })
    }

    fn num_rows(&self) -> usize {
        self.shape.iter().product()
    }

    /// The numbers of the computed rows, of a tensor with a number for each row.
    pub fn select(&self, tensor: &Tensor) -> Result<Tensor> {
        let numbers = tensor.reshape(self.num_rows())?;
        match &self.indices {
            None => Ok(numbers),
            Some(indices) => Ok(numbers.index_select(&index_tensor(indices)?, 0)?),
        }
    }

    /// The gradient of the result for each computed row. A scalar is not copied.
    pub fn grad_output(&self, grad_result: &Tensor) -> Result<Tensor> {
        match grad_result.rank() {
            0 => Ok(grad_result.broadcast_as(self.len)?),
            _ => self.select(grad_result),
        }
    }

    /// Some of the computed rows, and some columns, of a tensor (.., columns) with all rows: (rows, columns). They are not copied
    /// if the tensor is contiguous and all rows are computed. A copy has the dtype `copy_dtype` on the CPU.
    pub fn tile(
        &self,
        tensor: &Tensor,
        rows: &Range<usize>,
        columns: &Range<usize>,
        copy_dtype: DType,
    ) -> Result<Tensor> {
        let (is_contiguous, last) = (tensor.is_contiguous(), self.shape.len());
        if autograd::runs_on_cpu(tensor.device()) && (self.indices.is_some() || !is_contiguous) {
            let indices = self.indices.as_deref().map(|indices| &indices[rows.clone()]);
            return autograd::gather(tensor, indices, rows, columns, copy_dtype);
        }
        let (num_rows, num_columns) = (self.num_rows(), tensor.dims()[last]);
        let columns_of = |tensor: &Tensor, dim| tensor.narrow(dim, columns.start, columns.len());
        let tensor = match is_contiguous {
            true => columns_of(&tensor.reshape((num_rows, num_columns))?, 1)?,
            false => columns_of(tensor, last)?.reshape((num_rows, columns.len()))?,
        };
        Ok(narrow(&tensor, rows)?)
    }

    /// All rows along `dim`, from tiles of the computed ones. The others are 0, and without tiles all. `zeros(n)` is a tensor of n such
    /// rows.
    pub fn expand(
        &self,
        mut tiles: Vec<Tensor>,
        dim: usize,
        zeros: impl Fn(usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if tiles.is_empty() {
            tiles.push(zeros(self.len)?);
        }
        let Some(indices) = &self.indices else {
            return Ok(Tensor::cat(&tiles, dim)?);
        };
        // The row after the computed ones is 0.
        let mut positions = vec![self.len as i64; self.num_rows()];
        for (position, &row) in (0..).zip(indices) {
            if let Some(slot) = positions.get_mut(row as usize) {
                *slot = position;
            }
        }
        tiles.push(zeros(1)?);
        Ok(Tensor::cat(&tiles, dim)?.index_select(&index_tensor(&positions)?, dim)?)
    }

    /// What forward saved of the computed rows.
    pub fn select_saved(&self, saved: &Saved) -> Result<Saved> {
        match &self.indices {
            None => Ok(saved.clone()),
            Some(indices) => saved.select(&index_tensor(indices)?),
        }
    }
}

/// Indices of rows, on the CPU.
fn index_tensor(indices: &[i64]) -> candle_core::Result<Tensor> {
    Tensor::new(indices, &Device::Cpu)
}

/// The indices of the rows that count, or `None` if all count or the tensors are on a GPU, which would have to wait. Checks class
/// targets and row weights. The kernels check each tile again, but their error would count rows from the start of the tile.
pub(super) fn counted_rows(
    params: &LossParams,
    dtype: DType,
    targets: &Tensor,
) -> Result<Option<Vec<i64>>> {
    match autograd::runs_on_cpu(targets.device()) {
        true => autograd::counted_rows(params, dtype, targets),
        false => Ok(None),
    }
}

/// The tensor in another dtype. candle's conversion of an empty view may read beyond its storage.
pub(super) fn converted(tensor: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
    match tensor.elem_count() {
        0 => Tensor::zeros(tensor.shape(), dtype, tensor.device()),
        _ => tensor.to_dtype(dtype),
    }
}

/// A range of the first dimension.
pub(super) fn narrow(tensor: &Tensor, range: &Range<usize>) -> candle_core::Result<Tensor> {
    tensor.narrow(0, range.start, range.len())
}
