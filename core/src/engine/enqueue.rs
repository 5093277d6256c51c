//! Enqueueing by itself, where no transaction of the caller's is at hand.

use std::sync::Arc;

use sqlx::PgPool;

use super::batch::Batcher;
use crate::store::StoreError;
use crate::store::jobs::{self, Enqueued, NewJob};

/// Enqueues of a process, committed together. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Enqueuer {
    pool: PgPool,
    plain: Batcher<NewJob, i64>,
}

impl Enqueuer {
    /// Over a pool.
    pub fn start(pool: PgPool) -> Self {
        let plain = Batcher::start({
            let pool = pool.clone();
            move |batch: Arc<Vec<NewJob>>| {
                let pool = pool.clone();
                async move { jobs::enqueue_many(&pool, &batch).await }
            }
        });
        Self { pool, plain }
    }

    /// Puts a job into the queue; it is committed when this returns.
    pub async fn enqueue(&self, job: NewJob) -> Result<Enqueued, StoreError> {
        if job.unique_key.is_some() {
            return jobs::enqueue(&self.pool, &job).await;
        }
        self.plain.write(job).await.map(Enqueued::New)
    }
}
