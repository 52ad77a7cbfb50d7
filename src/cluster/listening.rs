//! What a worker serves over HTTP: its metrics, and whether it lives.

use std::net::SocketAddr;
use std::time::Duration;

use alluvium_protocol::metrics;
use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use tokio_util::task::AbortOnDropHandle;

use crate::printer;

/// The address may still be another process's: it is free when that one ends.
const LISTEN_AGAIN: Duration = Duration::from_secs(2);

/// Serves `/metrics`, `/livez`, `/healthz` and `/readyz`, until the handle is dropped.
pub(crate) fn serve_metrics(at: SocketAddr) -> AbortOnDropHandle<()> {
    let alive = || get(|| async { "ok\n" });
    let router = Router::new()
        .route("/livez", alive())
        .route("/healthz", alive())
        .route("/readyz", alive())
        .route(
            "/metrics",
            get(|| async { ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::text()) }),
        );
    AbortOnDropHandle::new(tokio::spawn(serve(at, router)))
}

/// Serves for as long as the process lives.
pub(crate) async fn serve(at: SocketAddr, router: Router) {
    let mut is_told = false;
    loop {
        match tokio::net::TcpListener::bind(at).await {
            Ok(listener) => {
                if let Err(error) = axum::serve(listener, router.clone()).await {
                    tracing::warn!(%error, "the HTTP server ended; it is started anew");
                }
            }
            Err(error) if !is_told => {
                is_told = true;
                printer::warn(&format!("cannot listen at {at} yet: {error}"));
            }
            Err(_) => {}
        }
        tokio::time::sleep(LISTEN_AGAIN).await;
    }
}
