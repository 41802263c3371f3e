//! The processes of the job, and what they exchange: tensors of f64 on the CPU.

use candle_core::{Device, Result, Tensor};
use mpi::collective::SystemOperation;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};
use std::cell::Cell;
use std::ops::Range;
use std::time::{Duration, Instant};

pub struct Processes {
    world: SimpleCommunicator,
    cost: Cell<Cost>,
}

/// What exchanges cost a process.
#[derive(Clone, Copy, Default)]
pub struct Cost {
    /// The size of the tensors that it gave to MPI. How often MPI sends them depends on its algorithms.
    pub bytes: usize,
    /// The time in MPI, in which it also waits for slower processes.
    pub time: Duration,
}

impl Processes {
    pub fn new(world: SimpleCommunicator) -> Self {
        Self { world, cost: Cell::default() }
    }

    pub fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    pub fn size(&self) -> usize {
        self.world.size() as usize
    }

    /// The part of `0..len` that belongs to this process. The sizes are equal multiples of `unit`, but the last parts may be
    /// smaller or empty.
    pub fn part(&self, len: usize, unit: usize) -> Range<usize> {
        let size = len.div_ceil(self.size()).next_multiple_of(unit);
        (self.rank() * size).min(len)..((self.rank() + 1) * size).min(len)
    }

    /// The tensors of all processes, stacked in the order of the ranks: (..) to (processes, ..). All have the same shape.
    pub fn gather(&self, tensor: &Tensor) -> Result<Tensor> {
        let shape = [&[self.size()], tensor.dims()].concat();
        self.exchange(tensor, &shape, |sent, received| self.world.all_gather_into(sent, received))
    }

    /// The sum of the tensors of all processes, which have the same shape. MPI adds them in one order for all processes.
    pub fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        self.exchange(tensor, tensor.dims(), |sent, received| {
            self.world.all_reduce_into(sent, received, SystemOperation::sum())
        })
    }

    /// The tensor of process 0. All have the same shape.
    pub fn broadcast(&self, tensor: &Tensor) -> Result<Tensor> {
        self.exchange(tensor, tensor.dims(), |sent, received| {
            received.copy_from_slice(sent);
            self.world.process_at_rank(0).broadcast_into(received);
        })
    }

    /// Waits for all processes.
    pub fn wait(&self) {
        self.world.barrier();
    }

    /// What exchanges cost since the last call.
    pub fn take_cost(&self) -> Cost {
        self.cost.take()
    }

    /// Ends all processes, so that none waits for one that has failed.
    pub fn abort(&self) -> ! {
        self.world.abort(1)
    }

    fn exchange(
        &self,
        tensor: &Tensor,
        shape: &[usize],
        call: impl FnOnce(&[f64], &mut [f64]),
    ) -> Result<Tensor> {
        let sent = tensor.flatten_all()?.to_vec1::<f64>()?;
        let mut received = vec![0.; shape.iter().product()];
        let start = Instant::now();
        call(&sent, &mut received);
        let Cost { bytes, time } = self.cost.get();
        let bytes = bytes + size_of_val(sent.as_slice());
        self.cost.set(Cost { bytes, time: time + start.elapsed() });
        Tensor::from_vec(received, shape, &Device::Cpu)
    }
}
