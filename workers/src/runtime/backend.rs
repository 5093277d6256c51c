//! apalis runs the attempts; this is the storage that it sees: assignments
//! from a channel, outcomes into another. Everything durable happens behind
//! those channels, so nothing here can fail, and apalis never ends the worker
//! for a trouble of the database.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use apalis::prelude::{TaskBuilder, WorkerBuilder, WorkerBuilderExt};
use apalis_core::backend::finalize::Ephemeral;
use apalis_core::backend::{Backend, BackendConfig};
use apalis_core::error::BoxDynError;
use apalis_core::task::Task;
use apalis_core::task::task_id::RandomId;
use apalis_core::worker::context::WorkerContext;
use apalis_core::worker::ext::parallelize::ParallelizeExt;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tower_layer::Layer;
use tower_service::Service;

use super::committer::Attempted;
use super::{Assignment, Shared, attempt};

/// Nothing can go wrong here; the type says so.
#[derive(Debug, thiserror::Error)]
pub(super) enum Never {}

struct Assignments {
    assigned: mpsc::UnboundedReceiver<Assignment>,
    done: mpsc::UnboundedSender<Attempted>,
}

impl Backend for Assignments {
    type Task = Task<Assignment>;
    type Error = Never;

    fn poll_ready(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), Never>> {
        Poll::Ready(Ok(()))
    }

    fn poll_next(&mut self, cx: &mut Context<'_>, _: &WorkerContext) -> Poll<Option<Result<Task<Assignment>, Never>>> {
        self.assigned.poll_recv(cx).map(|next| next.map(|assignment| Ok(TaskBuilder::new(assignment).build())))
    }

    fn poll_close(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), Never>> {
        self.assigned.close();
        Poll::Ready(Ok(()))
    }
}

impl BackendConfig for Assignments {
    type Args = Assignment;
    type Id = RandomId;
    type Kind = Ephemeral;
    type Config = ();
    type Layer = HandOver;

    fn config(&self) -> &() {
        &()
    }

    fn middleware(&mut self, _: &mut WorkerContext) -> HandOver {
        HandOver(self.done.clone())
    }
}

/// The outermost layer: hands each finished attempt to the committer.
#[derive(Clone)]
pub(super) struct HandOver(mpsc::UnboundedSender<Attempted>);

pub(super) struct HandOverService<S> {
    inner: S,
    done: mpsc::UnboundedSender<Attempted>,
}

impl<S> Layer<S> for HandOver {
    type Service = HandOverService<S>;

    fn layer(&self, inner: S) -> HandOverService<S> {
        HandOverService { inner, done: self.0.clone() }
    }
}

pin_project_lite::pin_project! {
    pub(super) struct HandOverFuture<F> {
        #[pin]
        inner: F,
        done: mpsc::UnboundedSender<Attempted>,
    }
}

impl<F> Future for HandOverFuture<F>
where
    F: Future<Output = Result<Attempted, BoxDynError>>,
{
    type Output = Result<(), BoxDynError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        this.inner.poll(cx).map(|finished| {
            // The committer outlives every attempt.
            let _ = this.done.send(finished?);
            Ok(())
        })
    }
}

impl<S> Service<Task<Assignment>> for HandOverService<S>
where
    S: Service<Task<Assignment>, Response = Attempted, Error = BoxDynError>,
{
    type Response = ();
    type Error = BoxDynError;
    type Future = HandOverFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxDynError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, task: Task<Assignment>) -> Self::Future {
        HandOverFuture { inner: self.inner.call(task), done: self.done.clone() }
    }
}

/// Runs attempts until `over`. Each is a tokio task of its own, so that a
/// busy handler holds up nobody else's.
pub(super) fn serve(
    shared: Arc<Shared>,
    assigned: mpsc::UnboundedReceiver<Assignment>,
    done: mpsc::UnboundedSender<Attempted>,
    over: CancellationToken,
) -> BoxFuture<'static, ()> {
    let lost = shared.lost.clone();
    let name = format!("capx-session-{}", shared.session);
    let worker = WorkerBuilder::new(name.as_str())
        .backend(Assignments { assigned, done })
        .parallelize(tokio::spawn)
        .catch_panic()
        .build(move |assignment: Assignment| {
            let shared = Arc::clone(&shared);
            async move { Ok::<_, BoxDynError>(attempt::run(&shared, assignment).await) }
        });
    let until = async move {
        over.cancelled().await;
        Ok::<(), std::io::Error>(())
    };
    // Boxed here and not awaited in an async block: apalis' layered types defy
    // the compiler's proof that such a block is Send.
    worker
        .run_until(until)
        .map(move |ended| {
            if let Err(error) = ended {
                tracing::error!(%error, "the attempts ended early; the session is given up");
                lost.cancel();
            }
        })
        .boxed()
}
