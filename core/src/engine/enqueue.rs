//! Enqueueing by itself, where no transaction of the caller's is at hand.

use std::sync::Arc;

use sqlx::PgPool;

use super::Waker;
use super::batch::Batcher;
use crate::store::StoreError;
use crate::store::jobs::{self, Enqueued, NewJob};

/// Enqueues of a process, committed together, each batch with one hint to the
/// workers. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Enqueuer {
    pool: PgPool,
    waker: Waker,
    plain: Batcher<NewJob, i64>,
}

impl Enqueuer {
    /// Over a pool.
    pub fn start(pool: PgPool, waker: Waker) -> Self {
        let plain = Batcher::start({
            let (pool, waker) = (pool.clone(), waker.clone());
            move |batch: Arc<Vec<NewJob>>| {
                let (pool, waker) = (pool.clone(), waker.clone());
                async move {
                    let mut connection = pool.acquire().await?;
                    let ids = match batch.as_slice() {
                        [alone] => vec![jobs::enqueue(&mut *connection, alone).await?.id()],
                        _ => jobs::enqueue_many(&mut *connection, &batch).await?,
                    };
                    waker.wake_over(connection);
                    Ok(ids)
                }
            }
        });
        Self { pool, waker, plain }
    }

    /// Puts a job into the queue; it is committed when this returns.
    pub async fn enqueue(&self, job: NewJob) -> Result<Enqueued, StoreError> {
        if job.unique_key.is_some() {
            let mut connection = self.pool.acquire().await?;
            let enqueued = jobs::enqueue(&mut *connection, &job).await?;
            self.waker.wake_over(connection);
            return Ok(enqueued);
        }
        self.plain.write(job).await.map(Enqueued::New)
    }
}
