//! The accept loop, with the limits that `axum::serve` leaves open: a time to
//! send headers in, a cap on connections, and a shutdown that ends even when
//! a client never lets go (hazards 0.5, S20).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;

use super::peer::WithPeer;

/// How long a client may take to send the headers of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The most connections at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 16_384;
/// The largest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// How long open requests may go on after a stop was asked for.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(15);
/// A client that takes nothing of its answer for this long is cut, and what was
/// kept for it let go.
const SLOW_READER: Duration = Duration::from_secs(30);
/// After a failed accept (out of file descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `stop`, then lets open requests end, for a bounded time.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    // HTTP/1 alone: telling it from HTTP/2 would mean to wait, without a time
    // limit, for a first byte that a client may never send.
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(HEAD_BYTES_MAX.max(8_192));
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let open = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let (stream, address, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(WithPeer::new(router.clone(), address));
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(SLOW_READER));
        let connection = open.watch(http.serve_connection(TokioIo::new(Box::pin(stream)), service));
        tokio::spawn(async move {
            // A client that breaks off is no news.
            let _ = connection.await;
            drop(place);
        });
    }
    drop(listener);
    if tokio::time::timeout(SHUTDOWN_TIMEOUT, open.shutdown()).await.is_err() {
        tracing::warn!("some connections did not end in {} s and are cut", SHUTDOWN_TIMEOUT.as_secs());
    }
}

/// A place for a connection, then the connection.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(std::io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    Ok((stream, address, place))
}
