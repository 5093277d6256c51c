//! The yardstick of the API: the same accept loop and a router, and nothing
//! behind them.

use std::net::SocketAddr;

use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::api::server;

/// A router on threads of its own, as a process would have them.
pub(super) struct Router {
    pub address: SocketAddr,
    stop: CancellationToken,
}

impl Router {
    /// One that answers every call with the same bytes.
    pub(super) fn start(answer: Bytes) -> anyhow::Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let (address, stop) = (listener.local_addr()?, CancellationToken::new());
        let token = stop.clone();
        let answers = move || {
            let answer = answer.clone();
            async move { ([(CONTENT_TYPE, "application/json")], answer) }
        };
        let routes = axum::Router::new()
            .route("/v1/companies/{company}", get(answers.clone()))
            .route("/v1/companies/{company}/playbooks/{playbook}/run", post(answers));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            runtime.block_on(async {
                server::serve(TcpListener::from_std(listener)?, routes, token).await;
                std::io::Result::Ok(())
            })
        });
        Ok(Self { address, stop })
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
