//! Group commit: what many callers of a process want written at once is
//! written by one statement. Each caller gets its answer after the commit,
//! as if it had been alone; whoever is alone waits for nobody.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot};

use crate::store::StoreError;

/// The most items of one commit.
const BATCH_MAX: usize = 256;
/// Callers that may wait before the next one waits to wait.
const WAITING_MAX: usize = 4_096;

type Answer<R> = oneshot::Sender<Result<R, StoreError>>;

/// Writes items together. Cheap to clone; its one task ends with its last
/// clone. One commit at a time: while it waits for the disk the next gathers,
/// and two would only halve the batches.
#[derive(Debug)]
pub struct Batcher<T, R> {
    items: mpsc::Sender<(T, Answer<R>)>,
}

impl<T, R> Clone for Batcher<T, R> {
    fn clone(&self) -> Self {
        Self { items: self.items.clone() }
    }
}

impl<T, R> Batcher<T, R>
where
    T: Send + Sync + 'static,
    R: Send + 'static,
{
    /// A batcher that writes with `write`, which gives one result an item, in
    /// order.
    pub fn start<F, Fut>(write: F) -> Self
    where
        F: Fn(Arc<Vec<T>>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<R>, StoreError>> + Send + 'static,
    {
        let (items, waiting) = mpsc::channel(WAITING_MAX);
        tokio::spawn(commits(waiting, write));
        Self { items }
    }

    /// Writes one item; the answer comes after its commit.
    pub async fn write(&self, item: T) -> Result<R, StoreError> {
        let (answer, answered) = oneshot::channel();
        let gone = || StoreError::Unavailable(sqlx::Error::WorkerCrashed);
        self.items.send((item, answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

async fn commits<T, R, F, Fut>(mut waiting: mpsc::Receiver<(T, Answer<R>)>, write: F)
where
    F: Fn(Arc<Vec<T>>) -> Fut,
    Fut: Future<Output = Result<Vec<R>, StoreError>>,
{
    let mut taken = Vec::with_capacity(BATCH_MAX);
    let mut answered = 0;
    while waiting.recv_many(&mut taken, BATCH_MAX).await > 0 {
        // Whoever is alone is not made to wait for others.
        if answered > 1 || taken.len() > 1 {
            gather(&mut waiting, &mut taken).await;
        }
        answered = taken.len();
        let (items, answers): (Vec<T>, Vec<Answer<R>>) = taken.drain(..).unzip();
        let items = Arc::new(items);
        // A panic harms those of this batch, not everybody after them.
        let written = AssertUnwindSafe(write(Arc::clone(&items))).catch_unwind().await;
        match written.unwrap_or(Err(StoreError::Unavailable(sqlx::Error::WorkerCrashed))) {
            Ok(results) => {
                for (answer, result) in answers.into_iter().zip(results) {
                    // Whoever asked may be gone; what was written stays.
                    let _ = answer.send(Ok(result));
                }
            }
            Err(error) if answers.len() == 1 || error.is_passing() => fail(answers, error),
            // A bad item harms only itself.
            Err(_) => {
                let items = Arc::try_unwrap(items).unwrap_or_default();
                for (item, answer) in items.into_iter().zip(answers) {
                    let result = write(Arc::new(vec![item])).await;
                    let _ =
                        answer
                            .send(result.and_then(|mut one| {
                                one.pop().ok_or(StoreError::Unavailable(sqlx::Error::RowNotFound))
                            }));
                }
            }
        }
    }
}

/// Takes along whoever comes while others have their turn: callers that the
/// last commit has answered ask again at once, and the first of them would
/// else have a commit to itself.
async fn gather<T>(waiting: &mut mpsc::Receiver<T>, taken: &mut Vec<T>) {
    let mut before = 0;
    while before < taken.len() && taken.len() < BATCH_MAX {
        before = taken.len();
        tokio::task::yield_now().await;
        while taken.len() < BATCH_MAX
            && let Ok(item) = waiting.try_recv()
        {
            taken.push(item);
        }
    }
}

/// Everybody gets the error; the first one the original.
fn fail<R>(answers: Vec<Answer<R>>, error: StoreError) {
    let mut original = Some(error);
    for answer in answers {
        let error = original.take().unwrap_or(StoreError::Unavailable(sqlx::Error::PoolTimedOut));
        let _ = answer.send(Err(error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubling() -> Batcher<i32, i32> {
        Batcher::start(|items: Arc<Vec<i32>>| async move {
            tokio::task::yield_now().await;
            if items.contains(&13) {
                return Err(StoreError::Conflict { constraint: "thirteen".into() });
            }
            Ok(items.iter().map(|n| n * 2).collect())
        })
    }

    #[tokio::test]
    async fn everybody_gets_the_answer_to_their_own_item() {
        let batcher = doubling();
        let all = (0..1_000).filter(|n| *n != 13).map(|n| {
            let batcher = batcher.clone();
            tokio::spawn(async move { (n, batcher.write(n).await) })
        });
        for task in all.collect::<Vec<_>>() {
            let (n, answer) = task.await.expect("a task");
            assert_eq!(answer.expect("an answer"), n * 2);
        }
    }

    #[tokio::test]
    async fn a_bad_item_harms_only_itself() {
        let batcher = doubling();
        let tasks: Vec<_> = (10..16)
            .map(|n| {
                let batcher = batcher.clone();
                tokio::spawn(async move { (n, batcher.write(n).await) })
            })
            .collect();
        for task in tasks {
            let (n, answer) = task.await.expect("a task");
            assert_eq!(answer.is_ok(), n != 13, "{n}: {answer:?}");
        }
    }
}
