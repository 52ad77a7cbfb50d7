//! What a worker serves over HTTP: its metrics, and whether it lives.

use std::net::SocketAddr;
use std::time::Duration;

use alluvium_coordinator::api::Surroundings;
use alluvium_protocol::metrics;
use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use tokio_util::task::AbortOnDropHandle;

use super::Services;
use crate::printer;

/// The address may still be another process's: it is free when that one ends.
const LISTEN_AGAIN: Duration = Duration::from_secs(2);

/// Serves `/metrics`, `/livez`, `/healthz` and `/readyz`, until the handle is dropped. Ready is who can
/// use its services; one process on its own needs none.
pub(crate) fn serve_metrics(at: SocketAddr, services: Option<Services>) -> AbortOnDropHandle<()> {
    let alive = || get(|| async { "ok\n" });
    let router = Router::new()
        .route("/livez", alive())
        .route("/healthz", alive())
        .route("/readyz", get(move || ready(services.clone())))
        .route(
            "/metrics",
            get(|| async { ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::text()) }),
        );
    AbortOnDropHandle::new(tokio::spawn(serve(at, router)))
}

async fn ready(services: Option<Services>) -> (StatusCode, String) {
    let ready = match &services {
        Some(services) => services.ready().await,
        None => Ok(()),
    };
    match ready {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
    }
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
