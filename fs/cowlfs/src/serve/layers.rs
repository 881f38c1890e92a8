//! Opening the layers of a new mount.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{Config, LIVE_CACHE_TIMEOUT, LiveLayers, Passthrough};
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::lock::{self, LayerLock};
use cowl_layers::layer::{Layer, Upper, moves};
use cowl_layers::setup::{SetupError, SetupKind, shown};
use cowl_overlay::Overlay;

/// The opened lower layers, with their locks.
pub(super) struct LowerLayers {
    space: XattrSpace,
    lowers: Vec<Arc<Layer>>,
    data: Vec<Arc<Layer>>,
    locks: Vec<Arc<LayerLock>>,
}

impl LowerLayers {
    /// Opens and locks the lower layers.
    pub(super) fn open(config: &mut Config) -> Result<Self, SetupError> {
        let is_live = config.live_layers == LiveLayers::Allowed;
        if is_live
            && let Some((upper, _)) = config.upper.take_if(|(upper, _)| lock::is_written(upper))
        {
            config.lowers.insert(0, upper);
        }
        let mut layers = Self {
            space: config.space.unwrap_or_else(XattrSpace::detect),
            lowers: Vec::new(),
            data: Vec::new(),
            locks: Vec::new(),
        };
        layers.lowers = layers.open_locked(config, &config.lowers)?;
        layers.data = layers.open_locked(config, &config.data_only)?;
        if layers.locks.len() < layers.lowers.len() + layers.data.len() {
            config.overlay.live_layers = true;
            config.cache_timeout = config.cache_timeout.min(LIVE_CACHE_TIMEOUT);
            config.passthrough = Passthrough::Off;
        }
        layers.remove_hidden()?;
        if layers.lowers.is_empty() && config.upper.is_none() {
            return Err(SetupError::new(
                SetupKind::Usage,
                "no layer to mount",
                "specify at least one with -o lowerdir=PATH",
            ));
        }
        Ok(layers)
    }

    /// Removes the layers below one whose root directory is opaque.
    fn remove_hidden(&mut self) -> Result<(), SetupError> {
        for (index, layer) in self.lowers.iter().enumerate() {
            if hides_layers_below(layer)? {
                self.lowers.truncate(index + 1);
                break;
            }
        }
        Ok(())
    }

    fn open_locked(
        &mut self,
        config: &Config,
        paths: &[PathBuf],
    ) -> Result<Vec<Arc<Layer>>, SetupError> {
        let mut layers = Vec::new();
        for path in paths {
            let layer = self.open_one(config, path)?;
            let (layer, lock) = match config.live_layers {
                LiveLayers::Refused => {
                    let (layer, lock) = lock::for_reading(layer)?;
                    (layer, Some(lock))
                }
                LiveLayers::Allowed => lock::for_reading_live(layer)?,
            };
            if lock.is_none() {
                log::warn!(
                    "another mount writes to the layer {}: its changes appear with a delay of up to {} s",
                    shown(path),
                    config.cache_timeout.min(LIVE_CACHE_TIMEOUT).as_secs_f64()
                );
            }
            self.locks.extend(lock);
            layers.push(layer);
        }
        Ok(layers)
    }

    fn open_one(&self, config: &Config, path: &Path) -> Result<Arc<Layer>, SetupError> {
        let layer = match config.foreign {
            true => Layer::open_foreign(path, self.space),
            false => Layer::open(path, self.space),
        }?;
        // Podman passes idmapped mounts of the layers, together with the same id map as an option.
        let options = &config.overlay;
        Ok(
            match options.uids.has_ranges() || options.gids.has_ranges() {
                true => layer.without_id_map(),
                false => layer,
            },
        )
    }

    /// Opens the upper layer, last, because it creates entries in the work directory: a refused mount leaves nothing
    /// there. Returns the overlay and the locks.
    pub(super) fn into_overlay(
        mut self,
        config: &Config,
    ) -> Result<(Arc<Overlay>, Vec<Arc<LayerLock>>), SetupError> {
        let upper = match &config.upper {
            Some((upper, work)) => {
                let layer = self.open_one(config, upper)?;
                if hides_layers_below(&layer)? {
                    self.lowers.clear();
                }
                let upper = Upper::from_layer(config.mount.through(), layer, work)?;
                let completed = match config.snapshots {
                    true => moves::complete(&upper, self.lowers.first()),
                    false => moves::refuse_pending(&upper),
                };
                completed.map_err(|error| {
                    SetupError::at(
                        "cannot complete a move of files to",
                        upper.layer.path(),
                        error,
                    )
                })?;
                Some(upper)
            }
            None => None,
        };
        let cannot =
            |error| SetupError::at("cannot read the layers for", &config.mountpoint, error);
        let build = || {
            let options = config.overlay.clone();
            let overlay = Overlay::new(upper.clone(), self.lowers.clone(), options);
            overlay.map(|overlay| overlay.with_data_layers(self.data.clone()))
        };
        let mut overlay = build().map_err(cannot)?;
        if overlay.adopt_kernel_index().map_err(cannot)? {
            overlay = build().map_err(cannot)?;
        }
        // `upper` is dropped here: the overlay alone holds it, and releases its locks when it drops it.
        Ok((Arc::new(overlay), self.locks))
    }
}

fn hides_layers_below(layer: &Layer) -> Result<bool, SetupError> {
    layer
        .hides_layers_below()
        .map_err(|error| SetupError::at("cannot read the layer", layer.path(), error))
}
