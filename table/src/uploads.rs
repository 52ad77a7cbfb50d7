//! The last store before the network: it counts requests and bytes, and leaves no half-uploaded object
//! behind: an upload in parts that is dropped before it is
//! complete (an error, a cancelled task) is aborted. Storage keeps, and bills, such parts for ever.

use std::ops::Range;
use std::sync::Arc;

use alluvium_protocol::metrics::metrics;
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};

/// The same store, counted, with uploads that abort when they are dropped.
#[derive(Debug)]
pub(crate) struct CleanUploads(pub(crate) Arc<dyn ObjectStore>);

impl std::fmt::Display for CleanUploads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods, reason = "a forgotten method would lose what the store can")]
impl ObjectStore for CleanUploads {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        metrics().request("put", 0, payload.content_length() as u64);
        self.0.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        metrics().request("put_multipart", 0, 0);
        let upload = self.0.put_multipart_opts(location, options).await?;
        Ok(Box::new(CleanUpload { upload: Some(upload), location: location.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let is_head = options.head;
        let got = self.0.get_opts(location, options).await;
        match &got {
            Ok(got) if !is_head => metrics().request("get", got.range.end - got.range.start, 0),
            _ => metrics().request(if is_head { "head" } else { "get" }, 0, 0),
        }
        got
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        metrics().request("get", ranges.iter().map(|range| range.end - range.start).sum(), 0);
        self.0.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        metrics().request("delete", 0, 0);
        self.0.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        metrics().request("list", 0, 0);
        self.0.list(prefix)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        metrics().request("list", 0, 0);
        self.0.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        metrics().request("list", 0, 0);
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.0.rename_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct CleanUpload {
    /// `None`: complete, or aborted.
    upload: Option<Box<dyn MultipartUpload>>,
    location: Path,
}

impl CleanUpload {
    fn over(&self) -> object_store::Error {
        let source = format!("the upload of {} is over", self.location).into();
        object_store::Error::Generic { store: "uploads", source }
    }
}

#[async_trait]
impl MultipartUpload for CleanUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        match &mut self.upload {
            Some(upload) => {
                metrics().request("put_part", 0, data.content_length() as u64);
                upload.put_part(data)
            }
            None => {
                let over = self.over();
                Box::pin(async move { Err(over) })
            }
        }
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let over = self.over();
        let upload = self.upload.as_mut().ok_or(over)?;
        let put = upload.complete().await?;
        self.upload = None;
        Ok(put)
    }

    async fn abort(&mut self) -> Result<()> {
        match self.upload.take() {
            Some(mut upload) => upload.abort().await,
            None => Ok(()),
        }
    }
}

impl Drop for CleanUpload {
    fn drop(&mut self) {
        let Some(mut upload) = self.upload.take() else { return };
        let location = self.location.clone();
        // Outside a runtime the process is ending; the bucket's own rules clean up then.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = upload.abort().await {
                    tracing::warn!(%location, %error, "parts of an upload were left behind");
                }
            });
        }
    }
}
